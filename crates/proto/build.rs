//! Compiles the .proto files without protoc: protox parses them, prost makes the
//! messages, tonic the gRPC services, and `TtrpcServices` the ttrpc services.

use prost::Message;
use std::error::Error;
use std::fmt::Write;
use std::path::{Path, PathBuf};

const CRI: &[&str] = &["proto/runtime/v1/api.proto", "proto/longshore/admin/v1/admin.proto"];
const SHIM: &[&str] = &[
    "proto/containerd/task/v2/task.proto",
    "proto/containerd/task/v3/task.proto",
    "proto/containerd/runtime/sandbox/v1/sandbox.proto",
    "proto/containerd/runtime/bootstrap/v1/bootstrap.proto",
    "proto/containerd/services/events/ttrpc/v1/ttrpc.proto",
    "proto/containerd/events/events.proto",
    "proto/containerd/runc/v1/runc.proto",
    "proto/runtimeoptions/v1/runtimeoptions.proto",
    "proto/io/containerd/cgroups/v1/cgroups.proto",
    "proto/io/containerd/cgroups/v2/cgroups.proto",
    "proto/longshore/shim/v1/shim.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    if std::env::var_os("CARGO_FEATURE_CRI").is_some() {
        cri(&out)?;
    }
    shim(&out)
}

fn compile(files: &[&str], out: &Path, name: &str) -> Result<prost_types::FileDescriptorSet, Box<dyn Error>> {
    let set = protox::compile(files, ["proto"])?;
    std::fs::write(out.join(name), set.encode_to_vec())?;
    Ok(set)
}

fn cri(out: &Path) -> Result<(), Box<dyn Error>> {
    let set = compile(CRI, out, "cri.bin")?;
    // ExecSync's answer is up to 2 x 16 MiB: `Bytes` spares a copy of it.
    tonic_prost_build::configure().bytes(".runtime.v1.ExecSyncResponse").compile_fds(set.clone())?;
    pbjson_build::Builder::new()
        .register_descriptors(&set.encode_to_vec())?
        .preserve_proto_field_names()
        .build(&[".runtime.v1", ".longshore.admin.v1"])?;
    Ok(())
}

fn shim(out: &Path) -> Result<(), Box<dyn Error>> {
    let set = compile(SHIM, out, "shim.bin")?;
    let mut config = prost_build::Config::new();
    if std::env::var_os("CARGO_FEATURE_SHIM").is_some() {
        config.service_generator(Box::new(TtrpcServices));
    }
    config.compile_fds(set)?;
    Ok(())
}

/// Makes of each service a server trait, a function that registers it under a
/// full service name of the caller's choice (task v2 and v3 are the same wire),
/// and a client.
struct TtrpcServices;

impl prost_build::ServiceGenerator for TtrpcServices {
    fn generate(&mut self, service: prost_build::Service, out: &mut String) {
        let name = &service.name;
        let module = name.to_lowercase();
        let full = format!("{}.{}", service.package, service.proto_name);
        let mut methods = String::new();
        let mut table = String::new();
        let mut calls = String::new();
        for m in &service.methods {
            let (f, input, output, wire) = (&m.name, &m.input_type, &m.output_type, &m.proto_name);
            let _ = write!(
                methods,
                "async fn {f}(&self, _ctx: &::ttrpc::r#async::TtrpcContext, _req: {input}) -> ::ttrpc::Result<{output}> {{
                    Err(crate::ttrpc_glue::unserved(\"{full}\", \"{wire}\"))
                }}\n"
            );
            let _ = write!(
                table,
                "{{ let s = service.clone();
                   methods.insert(\"{wire}\".to_string(), crate::ttrpc_glue::unary(move |ctx, req: {input}| {{
                       let s = s.clone();
                       Box::pin(async move {{ s.{f}(&ctx, req).await }})
                   }})); }}\n"
            );
            let _ = write!(
                calls,
                "pub async fn {f}(&self, timeout: ::std::time::Duration, req: {input}) -> ::ttrpc::Result<{output}> {{
                    crate::ttrpc_glue::call(&self.client, &self.service, \"{wire}\", timeout, &req).await
                }}\n"
            );
        }
        let _ = write!(
            out,
            "/// The server side of `{full}`; what is not overridden answers UNIMPLEMENTED.
            #[::async_trait::async_trait]
            pub trait {name}: Send + Sync + 'static {{ {methods} }}

            /// Registers a server of `{full}` under the full name `as_service`.
            pub fn register_{module}(service: ::std::sync::Arc<dyn {name}>, as_service: &str)
                -> ::std::collections::HashMap<String, ::ttrpc::r#async::Service> {{
                let mut methods = ::std::collections::HashMap::new();
                {table}
                ::std::collections::HashMap::from([(as_service.to_string(),
                    ::ttrpc::r#async::Service {{ methods, streams: ::std::collections::HashMap::new() }})])
            }}

            /// The client side of `{full}`. A timeout of zero means none.
            #[derive(Clone)]
            pub struct {name}Client<C = ::ttrpc::r#async::Client> {{ client: C, service: String }}

            impl {name}Client {{
                /// The service's full name in the protocol file.
                pub const SERVICE: &'static str = \"{full}\";
            }}

            impl<C: crate::ttrpc_glue::Caller> {name}Client<C> {{
                /// Calls go to the service of this full name.
                pub fn new(client: C, service: impl Into<String>) -> Self {{
                    Self {{ client, service: service.into() }}
                }}
                {calls}
            }}\n"
        );
    }
}
