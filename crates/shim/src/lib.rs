//! The shim: ttrpc services, task states, exit ordering.
