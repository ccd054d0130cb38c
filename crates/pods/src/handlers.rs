//! The runtime handlers of this node: what each can do, and what the operator has
//! chosen for its pods.

use proto::cri::PodSandboxConfig;
use runtime::SandboxKind;
use runtime::trust::{self, Subject, Trust};
use spec::{NodeFacts, NodePolicy};
use types::{Error, Result};

/// The annotation by which a pod says how far it is to be trusted.
const TRUSTED_SANDBOX: &str = "io.kubernetes.cri-o.TrustedSandbox";

/// One handler.
#[derive(Debug, Clone)]
pub struct Handler {
    /// What RunPodSandbox calls it.
    pub name: String,
    /// What the node can do with this handler's OCI runtime.
    pub node: NodeFacts,
    /// What the operator has chosen for its containers.
    pub policy: NodePolicy,
    /// What a pod's own process is.
    pub sandbox: SandboxKind,
    /// Why it can't run pods, where it can't.
    pub broken: Option<String>,
}

/// All of them; the first is the default one, and there is always one.
#[derive(Debug, Clone)]
pub struct Handlers {
    default: Handler,
    others: Vec<Handler>,
    default_trust: Trust,
}

impl Handlers {
    /// The default one and the others.
    pub fn new(default: Handler, others: Vec<Handler>) -> Self {
        Self { default, others, default_trust: Trust::default() }
    }

    /// How far pods are trusted that don't say.
    #[must_use]
    pub fn with_default_trust(mut self, trust: Trust) -> Self {
        self.default_trust = trust;
        self
    }

    /// The name of the handler that a pod gets which asks for `asked`: where a handler
    /// `trusted` is configured, pods that ask for none or for `untrusted` go by the
    /// rules of trust (behaviours.md section 2).
    pub fn choose<'a>(&self, asked: &'a str, config: &PodSandboxConfig) -> &'a str {
        let has = |name: &str| self.iter().any(|h| h.name == name);
        if !has(trust::TRUSTED) || !(asked.is_empty() || asked == trust::UNTRUSTED) {
            return asked;
        }
        let linux = config.linux.as_ref().and_then(|l| l.security_context.as_ref());
        let said = config.annotations.get(TRUSTED_SANDBOX).map(String::as_str);
        let untrusted = asked == trust::UNTRUSTED || said == Some("false");
        let subject = Subject {
            privileged: linux.is_some_and(|s| s.privileged),
            trust: if untrusted { Trust::Untrusted } else { Trust::Trusted },
        };
        let choice = trust::choose(subject, self.default_trust, has(trust::UNTRUSTED));
        if let Some(warning) = choice.warning {
            tracing::warn!("pod {}: {warning}", crate::state::pod_name(config));
        }
        choice.handler
    }

    /// That of pods which name none.
    pub fn default_one(&self) -> &Handler {
        &self.default
    }

    /// The default one first.
    pub fn iter(&self) -> impl Iterator<Item = &Handler> {
        std::iter::once(&self.default).chain(&self.others)
    }

    /// A handler by name; the empty name is the default one.
    ///
    /// # Errors
    /// `NotFound`, naming those that there are.
    pub fn find(&self, name: &str) -> Result<&Handler> {
        if name.is_empty() {
            return Ok(&self.default);
        }
        self.iter().find(|h| h.name == name).ok_or_else(|| {
            let known: Vec<&str> = self.iter().map(|h| h.name.as_str()).collect();
            Error::not_found(format!("no runtime handler {name:?} is configured"))
                .hint(format!("there are: {}; the table [runtimes.{name}] would add it", known.join(", ")))
        })
    }

    /// The handler that a new pod asks for.
    ///
    /// # Errors
    /// `InvalidArgument` for one that is not configured; `FailedPrecondition` for one
    /// that can't run here.
    pub fn admit(&self, name: &str) -> Result<&Handler> {
        let handler = self.find(name).map_err(|e| e.with_kind(types::ErrorKind::InvalidArgument))?;
        match &handler.broken {
            Some(why) => {
                Err(Error::precondition(format!("the runtime handler {:?} can't run pods: {why}", handler.name)))
            }
            None => Ok(handler),
        }
    }

    /// The handler that a new container of an existing pod is made by.
    ///
    /// # Errors
    /// `FailedPrecondition` for one that is no longer configured.
    pub fn of_pod(&self, name: &str) -> Result<&Handler> {
        self.find(name).map_err(|_| {
            Error::precondition(format!("its pod's runtime handler {name:?} is no longer configured"))
                .hint("add it to the configuration again; until then the pod can only be stopped and removed")
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_handler_is_found_by_name_or_refused_by_name() {
        let one = |name: &str, broken: Option<&str>| Handler {
            name: name.into(),
            node: crate::facts::node_facts(None).unwrap(),
            policy: NodePolicy::default(),
            sandbox: SandboxKind::Pinned,
            broken: broken.map(str::to_string),
        };
        let all = Handlers::new(one("runc", None), vec![one("crun", Some("it refuses this layout"))]);
        assert_eq!(all.admit("").unwrap().name, "runc");
        assert_eq!(all.admit("runc").unwrap().name, "runc");
        let e = all.admit("kata").unwrap_err();
        assert_eq!(e.kind(), types::ErrorKind::InvalidArgument);
        assert!(e.to_string().contains("\"kata\"") && e.to_string().contains("runc, crun"), "{e}");
        let e = all.admit("crun").unwrap_err();
        assert_eq!(e.kind(), types::ErrorKind::FailedPrecondition);
        assert!(e.to_string().contains("refuses this layout"), "{e}");
        // A pod that it has goes on as far as it can.
        assert_eq!(all.of_pod("crun").unwrap().name, "crun");
        assert!(all.of_pod("kata").unwrap_err().to_string().contains("no longer configured"));
    }

    #[test]
    fn trust_chooses_between_two_handlers_where_they_are_configured() {
        let one = |name: &str| Handler {
            name: name.into(),
            node: crate::facts::node_facts(None).unwrap(),
            policy: NodePolicy::default(),
            sandbox: SandboxKind::Pinned,
            broken: None,
        };
        let pod = |annotation: Option<&str>, privileged: bool| PodSandboxConfig {
            annotations: annotation.map(|a| (TRUSTED_SANDBOX.to_string(), a.to_string())).into_iter().collect(),
            linux: Some(proto::cri::LinuxPodSandboxConfig {
                security_context: Some(proto::cri::LinuxSandboxSecurityContext { privileged, ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let plain = Handlers::new(one("runc"), vec![one("untrusted")]);
        assert_eq!(plain.choose("", &pod(Some("false"), false)), "");
        let both = Handlers::new(one("trusted"), vec![one("untrusted"), one("kata")]);
        assert_eq!(both.choose("kata", &pod(Some("false"), false)), "kata");
        assert_eq!(both.choose("", &pod(None, false)), "trusted");
        assert_eq!(both.choose("", &pod(Some("false"), false)), "untrusted");
        assert_eq!(both.choose("untrusted", &pod(None, false)), "untrusted");
        assert_eq!(both.choose("untrusted", &pod(None, true)), "trusted");
        let strict = both.with_default_trust(Trust::Untrusted);
        assert_eq!(strict.choose("", &pod(None, false)), "untrusted");
        assert_eq!(strict.choose("trusted", &pod(None, false)), "trusted");
    }
}
