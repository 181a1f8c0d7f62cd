//! List and watch of one kind of object, without a store of API objects.
