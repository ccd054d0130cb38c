//! The shim manager.
