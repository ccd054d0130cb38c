//! The CRI surface over gRPC: validate, call, map.
