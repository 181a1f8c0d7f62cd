//! The session against a controller in this process.
