//! Generated wire types: CRI v1 (gRPC), containerd's shim v2 (ttrpc) and two
//! small services of our own.
//!
//! ```text
//! proto/runtime/v1        CRI, feature `cri`: tonic client and server, proto3 JSON
//! proto/longshore/admin   what our CLI needs beyond CRI, feature `cri`
//! proto/containerd, io/…  the shim v2 wire; services with feature `shim`
//! proto/longshore/shim    what only our own shim can
//! ```
//!
//! Task v2 and v3 are the same wire under two names: the Rust types are those of
//! v3, and servers and clients take the service's name.

#[cfg(feature = "shim")]
pub mod ttrpc_glue;

#[allow(missing_docs, clippy::all, clippy::pedantic)]
#[cfg(feature = "cri")]
pub mod cri {
    //! `runtime.v1`: the Container Runtime Interface.
    tonic::include_proto!("runtime.v1");
    include!(concat!(env!("OUT_DIR"), "/runtime.v1.serde.rs"));
    /// The compiled descriptors of CRI and of the admin service.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cri.bin"));
}

#[allow(missing_docs, clippy::all, clippy::pedantic)]
#[cfg(feature = "cri")]
pub mod admin {
    //! `longshore.admin.v1`: what the command line needs beyond CRI.
    tonic::include_proto!("longshore.admin.v1");
    include!(concat!(env!("OUT_DIR"), "/longshore.admin.v1.serde.rs"));
}

#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod containerd {
    //! Containerd's shim v2 wire.
    pub mod types {
        include!(concat!(env!("OUT_DIR"), "/containerd.types.rs"));
    }
    pub mod v1 {
        pub mod types {
            include!(concat!(env!("OUT_DIR"), "/containerd.v1.types.rs"));
        }
    }
    pub mod task {
        pub mod v3 {
            include!(concat!(env!("OUT_DIR"), "/containerd.task.v3.rs"));
        }
    }
    pub mod runtime {
        pub mod sandbox {
            pub mod v1 {
                include!(concat!(env!("OUT_DIR"), "/containerd.runtime.sandbox.v1.rs"));
            }
        }
        pub mod bootstrap {
            pub mod v1 {
                include!(concat!(env!("OUT_DIR"), "/containerd.runtime.bootstrap.v1.rs"));
            }
        }
    }
    pub mod services {
        pub mod events {
            pub mod ttrpc {
                pub mod v1 {
                    include!(concat!(env!("OUT_DIR"), "/containerd.services.events.ttrpc.v1.rs"));
                }
            }
        }
    }
    pub mod events {
        include!(concat!(env!("OUT_DIR"), "/containerd.events.rs"));
    }
    pub mod runc {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/containerd.runc.v1.rs"));
        }
    }
}

#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod runtimeoptions {
    //! Options of shims that read a configuration file.
    include!(concat!(env!("OUT_DIR"), "/runtimeoptions.v1.rs"));
}

#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod cgroups {
    //! The metrics that a shim's Stats answers.
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/io.containerd.cgroups.v1.rs"));
    }
    pub mod v2 {
        include!(concat!(env!("OUT_DIR"), "/io.containerd.cgroups.v2.rs"));
    }
}

#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod longshore_shim {
    //! `longshore.shim.v1`: what only our own shim can.
    include!(concat!(env!("OUT_DIR"), "/longshore.shim.v1.rs"));
}

/// The compiled descriptors of the shim v2 wire.
pub const SHIM_DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/shim.bin"));

/// The full names under which the task service is served.
pub const TASK_SERVICES: [&str; 2] = ["containerd.task.v3.Task", "containerd.task.v2.Task"];

/// Packs a message as containerd does: its type URL is the bare full name.
pub fn pack(full_name: &str, message: &impl prost::Message) -> prost_types::Any {
    prost_types::Any { type_url: full_name.to_string(), value: message.encode_to_vec() }
}
