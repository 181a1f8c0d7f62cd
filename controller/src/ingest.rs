//! API objects to the core's compact model, one object at a time.
