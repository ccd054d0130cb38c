//! Standard IO of processes: FIFOs, terminals, files, the CRI log, capped sinks and drains.
