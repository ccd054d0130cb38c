//! Network configurations, as CNI's specification has them: a list of plugins, or
//! one plugin, which is a list of one. Pure.

use ::types::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fmt;

/// A version of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u32, u32, u32);

impl Version {
    /// The oldest that we speak: before it plugins could not be chained.
    pub const OLDEST: Self = Self(0, 3, 0);
    /// The newest that we speak: with GC and STATUS.
    pub const NEWEST: Self = Self(1, 1, 0);

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.').map(|p| p.parse().ok());
        let version = Self(parts.next()??, parts.next()??, parts.next()??);
        parts.next().is_none().then_some(version)
    }

    /// CHECK exists, and DEL is told the result of ADD.
    pub fn has_check(self) -> bool {
        self >= Self(0, 4, 0)
    }

    /// GC and STATUS exist.
    pub fn has_gc_and_status(self) -> bool {
        self >= Self(1, 1, 0)
    }

    fn is_spoken(self) -> bool {
        (Self::OLDEST..=Self::NEWEST).contains(&self)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// One plugin of a list.
#[derive(Debug, Clone, PartialEq)]
pub struct Plugin {
    /// The name of its binary.
    pub kind: String,
    /// The capabilities that it asks for: what it wants to be told of each pod.
    pub capabilities: BTreeSet<String>,
    conf: Map<String, Value>,
}

/// A network: the plugins that attach a pod to it, in their order.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkList {
    /// The network's name.
    pub name: String,
    /// The version that is spoken with its plugins.
    pub version: Version,
    /// CHECK is never asked for.
    pub disable_check: bool,
    /// GC is never asked for.
    pub disable_gc: bool,
    /// At least one.
    pub plugins: Vec<Plugin>,
    /// The file's text, which is kept with each attachment.
    pub text: String,
}

impl NetworkList {
    /// Reads a configuration, whichever of its two forms it has.
    ///
    /// # Errors
    /// `InvalidArgument`, naming the field.
    pub fn parse(text: &str) -> Result<Self> {
        let conf: Map<String, Value> =
            serde_json::from_str(text).map_err(|e| Error::invalid("it is no JSON object").because(e))?;
        let name = string(&conf, "name")?.unwrap_or_default();
        if !is_name(&name) {
            return Err(Error::invalid(format!("the network's name {name:?} is none"))
                .hint("letters and digits with `.`, `_` and `-` inside"));
        }
        let version = version(&conf)?;
        let plugins = match conf.get("plugins") {
            None if !conf.contains_key("type") => {
                return Err(Error::invalid("it has neither \"plugins\" nor a \"type\"").hint(
                    "plugins that lie in files of their own (loadOnlyInlinedPlugins false) are not read: write them \
                     into \"plugins\"",
                ));
            }
            None => vec![plugin(&conf)?],
            Some(Value::Array(all)) => {
                let all = all.iter().enumerate().map(|(n, p)| match p {
                    Value::Object(p) => plugin(p).map_err(|e| e.within(format!("plugin {n}"))),
                    _ => Err(Error::invalid(format!("plugin {n} is no object"))),
                });
                all.collect::<Result<_>>()?
            }
            Some(_) => return Err(Error::invalid("\"plugins\" is no list")),
        };
        if plugins.is_empty() {
            return Err(Error::invalid("it has no plugins"));
        }
        Ok(Self {
            name,
            version,
            disable_check: boolean(&conf, "disableCheck")?,
            disable_gc: boolean(&conf, "disableGC")?,
            plugins,
            text: text.to_owned(),
        })
    }

    /// What a plugin is given on stdin. `capabilities` holds what there is to tell;
    /// the plugin gets what it asks for.
    pub fn input(
        &self,
        plugin: &Plugin,
        previous: Option<&Value>,
        capabilities: &Map<String, Value>,
    ) -> Map<String, Value> {
        let mut conf = plugin.conf.clone();
        conf.insert("cniVersion".into(), self.version.to_string().into());
        conf.insert("name".into(), self.name.clone().into());
        if let Some(previous) = previous {
            conf.insert("prevResult".into(), previous.clone());
        }
        let wanted: Map<String, Value> = capabilities
            .iter()
            .filter(|(name, _)| plugin.capabilities.contains(*name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !wanted.is_empty() {
            conf.insert("runtimeConfig".into(), wanted.into());
        }
        conf
    }

    /// A plugin of it asks for this capability.
    pub fn asks_for(&self, capability: &str) -> bool {
        self.plugins.iter().any(|p| p.capabilities.contains(capability))
    }
}

fn plugin(conf: &Map<String, Value>) -> Result<Plugin> {
    let kind = string(conf, "type")?.unwrap_or_default();
    // It becomes a path: it must not lead out of the plugins' directories.
    if kind.is_empty() || kind.contains('/') || kind.starts_with('.') {
        return Err(Error::invalid(format!("the plugin's type {kind:?} is no name of a binary")));
    }
    let mut capabilities = BTreeSet::new();
    match conf.get("capabilities") {
        None | Some(Value::Null) => {}
        Some(Value::Object(all)) => {
            for (name, wanted) in all {
                match wanted {
                    Value::Bool(true) => _ = capabilities.insert(name.clone()),
                    Value::Bool(false) => {}
                    _ => return Err(Error::invalid(format!("the capability {name:?} is neither true nor false"))),
                }
            }
        }
        Some(_) => return Err(Error::invalid("\"capabilities\" is no object")),
    }
    Ok(Plugin { kind, capabilities, conf: conf.clone() })
}

/// The newest version that the configuration names and we speak. Without one it is
/// 0.1.0, by the specification, which we don't.
fn version(conf: &Map<String, Value>) -> Result<Version> {
    let mut named = Vec::new();
    named.extend(string(conf, "cniVersion")?);
    if let Some(Value::Array(all)) = conf.get("cniVersions") {
        named.extend(all.iter().filter_map(|v| v.as_str().map(str::to_owned)));
    }
    let spoken = named.iter().filter_map(|v| Version::parse(v)).filter(|v| v.is_spoken()).max();
    spoken.ok_or_else(|| {
        let named = if named.is_empty() { "none, which is 0.1.0".to_owned() } else { named.join(", ") };
        Error::invalid(format!("its cniVersion is not spoken: {named}")).hint(format!(
            "{} to {} are",
            Version::OLDEST,
            Version::NEWEST
        ))
    })
}

/// As libcni allows it: it becomes part of file names.
fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        && name.len() <= 128
}

fn string(conf: &Map<String, Value>, key: &str) -> Result<Option<String>> {
    match conf.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(s)) => Ok(Some(s.clone())),
        Some(_) => Err(Error::invalid(format!("{key:?} is no string"))),
    }
}

/// A switch; some tools write it as a string.
fn boolean(conf: &Map<String, Value>, key: &str) -> Result<bool> {
    match conf.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(b)) => Ok(*b),
        Some(Value::String(s)) if s == "true" || s == "false" => Ok(s == "true"),
        Some(_) => Err(Error::invalid(format!("{key:?} is neither true nor false"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const LIST: &str = r#"{"cniVersion":"1.0.0","name":"net","plugins":[
        {"type":"bridge","bridge":"b0","capabilities":{"ips":true,"mac":false}},
        {"type":"portmap","capabilities":{"portMappings":true}}]}"#;

    #[test]
    fn a_plugin_gets_its_own_and_what_it_asks_for() {
        let list = NetworkList::parse(LIST).unwrap();
        let capabilities = json!({"portMappings": [1], "ips": ["1.2.3.4"], "mac": "x"});
        let capabilities = capabilities.as_object().unwrap();
        let first = list.input(&list.plugins[0], None, capabilities);
        assert_eq!(
            Value::from(first),
            json!({"type":"bridge","bridge":"b0","capabilities":{"ips":true,"mac":false},
                "cniVersion":"1.0.0","name":"net","runtimeConfig":{"ips":["1.2.3.4"]}})
        );
        let second = list.input(&list.plugins[1], Some(&json!({"ips": []})), capabilities);
        assert_eq!(second["prevResult"], json!({"ips": []}));
        assert_eq!(second["runtimeConfig"], json!({"portMappings": [1]}));
        assert!(list.asks_for("ips") && !list.asks_for("mac"));
        let none = list.input(&list.plugins[1], None, &Map::new());
        assert!(!none.contains_key("runtimeConfig") && !none.contains_key("prevResult"));
    }

    #[test]
    fn one_plugin_is_a_list_of_one() {
        let list = NetworkList::parse(r#"{"cniVersion":"0.3.1","name":"n","type":"ptp"}"#).unwrap();
        assert_eq!((list.plugins.len(), list.plugins[0].kind.as_str()), (1, "ptp"));
        assert!(!list.version.has_check() && !list.disable_gc);
    }

    #[test]
    fn the_newest_common_version_is_spoken() {
        let of = |versions: &str| {
            NetworkList::parse(&format!(r#"{{{versions},"name":"n","type":"x"}}"#)).map(|l| l.version.to_string())
        };
        assert_eq!(of(r#""cniVersion":"1.1.0""#).unwrap(), "1.1.0");
        assert_eq!(of(r#""cniVersion":"0.4.0","cniVersions":["0.3.1","1.0.0","7.0.0"]"#).unwrap(), "1.0.0");
        for bad in [r#""cniVersion":"0.2.0""#, r#""cniVersion":"2.0.0""#, r#""cniVersion":"x""#, r#""a":1"#] {
            let e = of(bad).unwrap_err().to_string();
            assert!(e.contains("cniVersion") && e.contains("0.3.0 to 1.1.0"), "{e}");
        }
    }

    #[test]
    fn what_is_no_configuration_is_refused_with_its_reason() {
        for (bad, reason) in [
            ("", "no JSON"),
            ("[]", "no JSON object"),
            (r#"{"cniVersion":"1.0.0","type":"x"}"#, "name"),
            (r#"{"cniVersion":"1.0.0","name":"../x","type":"x"}"#, "name"),
            (r#"{"cniVersion":"1.0.0","name":"n"}"#, "type"),
            (r#"{"cniVersion":"1.0.0","name":"n","type":"../../bin/sh"}"#, "type"),
            (r#"{"cniVersion":"1.0.0","name":"n","plugins":[]}"#, "no plugins"),
            (r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":1}]}"#, "plugin 0"),
            (r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"x","capabilities":{"a":1}}]}"#, "capability"),
            (r#"{"cniVersion":"1.0.0","name":"n","type":"x","disableCheck":3}"#, "disableCheck"),
        ] {
            let e = NetworkList::parse(bad).unwrap_err().to_string();
            assert!(e.contains(reason), "{bad}: {e}");
        }
    }
}
