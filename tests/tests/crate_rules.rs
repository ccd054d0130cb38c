//! Who may depend on whom: the "never" column of the crates' table, for direct,
//! normal dependencies. A new crate needs a rule here before it compiles anywhere.

use serde_json::Value;
use std::collections::BTreeMap;
use std::process::Command;

/// Any crate of ours.
const OURS: &str = "longshore-*";
/// What does IO: a crate that never does has none of these.
const IO: [&str; 9] =
    ["tokio", "hyper", "reqwest", "rusqlite", "tonic", "ttrpc", "longshore-sys", "longshore-store", "async-trait"];

struct Rule {
    package: &'static str,
    /// Dependencies that it never has; [`OURS`] stands for all of our crates.
    never: Vec<&'static str>,
    /// Exceptions to [`OURS`].
    but: &'static [&'static str],
}

fn rules() -> Vec<Rule> {
    let rule = |package, never: &[&'static str]| Rule { package, never: never.to_vec(), but: &[] };
    let but_types = &["longshore-types"];
    let mut types = rule("longshore-types", &[OURS]);
    types.never.extend(IO);
    let mut spec = rule("longshore-spec", &["futures", "tokio-stream"]);
    spec.never.extend(IO);
    vec![
        rule("longshore-proto", &[OURS]),
        types,
        rule("longshore-fault", &[OURS, "tokio"]),
        Rule { package: "longshore-sys", never: vec!["tokio", OURS], but: but_types },
        spec,
        rule("longshore-cri", &["longshore-shim", "longshore-oci", "longshore-sys"]),
        rule("longshore-pods", &["tonic", "ttrpc", "longshore-oci"]),
        rule("longshore-runtime", &["longshore-pods", "longshore-cri"]),
        rule("longshore-shim", &["longshore-cri", "longshore-images", "longshore-network"]),
        rule("longshore-monitor", &["longshore-shim", "longshore-pods"]),
        rule("longshore-oci", &["ttrpc", "longshore-stdio", "longshore-shim"]),
        rule("longshore-stdio", &["ttrpc", "longshore-pods"]),
        rule("longshore-images", &["longshore-pods", "longshore-runtime"]),
        rule("longshore-snapshots", &["longshore-images", "reqwest", "oci-client"]),
        rule("longshore-network", &["longshore-cri", "longshore-images"]),
        rule("longshore-streaming", &["longshore-pods", "longshore-cri"]),
        rule("longshore-store", &["longshore-cri", "longshore-runtime"]),
        Rule { package: "longshore-telemetry", never: vec![OURS], but: but_types },
        rule("longshore-testkit", &[]),
        rule("longshore-tests", &[]),
        // The composition roots: they may put anything together.
        rule("longshore", &[]),
        rule("containerd-shim-longshore-v2", &[]),
        rule("longshore-pod-init", &[]),
        rule("longshore-conmon", &[]),
    ]
}

/// Crates that only a composition root, or only a test, may use.
fn everywhere(package: &str, dependency: &str) -> Option<String> {
    let root = ["longshore", "containerd-shim-longshore-v2", "longshore-conmon"].contains(&package);
    match dependency {
        "anyhow" if !root => Some(format!("{package} uses anyhow: libraries have types::Error")),
        "longshore-testkit" if package != "longshore-tests" => {
            Some(format!("{package} uses testkit other than for its tests"))
        }
        _ => None,
    }
}

/// The direct, normal dependencies of each package of the workspace.
fn dependencies(metadata: &Value) -> BTreeMap<String, Vec<String>> {
    let list = |v: &Value| v.as_array().cloned().unwrap_or_default();
    let text = |v: &Value| v.as_str().unwrap_or_default().to_string();
    let normal = |p: &Value| -> Vec<String> {
        list(&p["dependencies"]).iter().filter(|d| d["kind"].is_null()).map(|d| text(&d["name"])).collect()
    };
    list(&metadata["packages"]).iter().map(|p| (text(&p["name"]), normal(p))).collect()
}

fn violations(packages: &BTreeMap<String, Vec<String>>, rules: &[Rule]) -> Vec<String> {
    let mut found = Vec::new();
    for (package, dependencies) in packages {
        let Some(rule) = rules.iter().find(|r| r.package == package) else {
            found.push(format!("{package} has no rule: say in this file what it never depends on"));
            continue;
        };
        for dependency in dependencies {
            let ours = packages.contains_key(dependency) && !rule.but.contains(&dependency.as_str());
            let never = |n: &&str| *n == dependency || (*n == OURS && ours);
            if rule.never.iter().any(never) {
                found.push(format!("{package} never depends on {dependency}"));
            }
            found.extend(everywhere(package, dependency));
        }
    }
    found
}

#[test]
fn crates_keep_their_distance() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata answers in JSON");
    let packages = dependencies(&metadata);
    assert!(packages.len() > 10, "the workspace was not read: {packages:?}");
    let found = violations(&packages, &rules());
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn a_violation_is_found() {
    let packages = |list: &[(&str, &[&str])]| -> BTreeMap<String, Vec<String>> {
        list.iter().map(|(p, d)| (p.to_string(), d.iter().map(ToString::to_string).collect())).collect()
    };
    let all = packages(&[
        ("longshore-types", &["tokio", "longshore-new"]),
        ("longshore-sys", &["longshore-types", "rustix"]),
        ("longshore-new", &[]),
        ("longshore-cri", &["longshore-shim", "anyhow", "longshore-testkit"]),
    ]);
    let found = violations(&all, &rules());
    assert_eq!(found.len(), 6, "{found:?}");
    assert!(!found.iter().any(|f| f.starts_with("longshore-sys")), "{found:?}");
}
