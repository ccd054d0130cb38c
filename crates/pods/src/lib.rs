//! Pods, containers and execs: states, admission, recovery, events.
