//! A pod's network namespace and what is in it.
