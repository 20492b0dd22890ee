//! Generates the protocol's messages and services from `proto/`.

use std::{env, error::Error, fs, path::Path};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

/// Modules that come out of the compiler, in an order of no meaning.
const MODULES: [&str; 9] = [
    "agent",
    "agent_ttrpc",
    "csi",
    "health",
    "health_ttrpc",
    "oci",
    "relay",
    "relay_ttrpc",
    "types",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let out = env::var("OUT_DIR")?;
    let files = ["agent", "csi", "health", "oci", "relay", "types"].map(|name| format!("proto/{name}.proto"));
    Codegen::new()
        .out_dir(&out)
        .include("proto")
        .inputs(files)
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false).lite_runtime(true))
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .run()?;
    let modules = MODULES.map(|name| {
        format!("#[allow(clippy::all, clippy::pedantic, clippy::restriction, missing_docs, unused_qualifications)]\npub mod {name};\n")
    });
    fs::write(Path::new(&out).join("protocol.rs"), modules.concat())?;
    Ok(())
}
