//! The trusted and the untrusted runtime, as CRI-O had them before there were
//! runtime handlers (behaviours.md section 2); here they are two handlers by name.

/// How far a pod's code is trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Trust {
    /// As the node's own.
    #[default]
    Trusted,
    /// Not at all.
    Untrusted,
}

/// What is known of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subject {
    /// It has, or may have, privileged containers.
    pub privileged: bool,
    /// How far it is trusted, by its own word.
    pub trust: Trust,
}

/// Which of the two runs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// [`TRUSTED`] or [`UNTRUSTED`].
    pub handler: &'static str,
    /// What an operator should know.
    pub warning: Option<&'static str>,
}

/// The handler of what is trusted.
pub const TRUSTED: &str = "trusted";
/// The handler of what is not.
pub const UNTRUSTED: &str = "untrusted";

/// Chooses between the two. `has_untrusted`: an untrusted handler is configured;
/// `default`: the node's default trust level.
pub fn choose(subject: Subject, default: Trust, has_untrusted: bool) -> Choice {
    let trusted = |warning| Choice { handler: TRUSTED, warning };
    if subject.privileged {
        let warning = (subject.trust == Trust::Untrusted)
            .then_some("it is untrusted, but privileged, and so runs with the trusted runtime");
        return trusted(warning);
    }
    let wants_untrusted = subject.trust == Trust::Untrusted || default == Trust::Untrusted;
    match (wants_untrusted, has_untrusted) {
        (false, _) | (true, false) => trusted(None),
        (true, true) => Choice { handler: UNTRUSTED, warning: None },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn trust() -> impl Strategy<Value = Trust> {
        prop_oneof![Just(Trust::Trusted), Just(Trust::Untrusted)]
    }

    proptest! {
        #[test]
        fn each_rule_holds_whatever_the_others_say(
            privileged: bool, trust in trust(), default in trust(), configured: bool
        ) {
            let c = choose(Subject { privileged, trust }, default, configured);
            if privileged {
                prop_assert_eq!(c.handler, TRUSTED);
            }
            if !configured {
                prop_assert_eq!(c.handler, TRUSTED);
            }
            if !privileged && configured && trust == Trust::Untrusted {
                prop_assert_eq!(c.handler, UNTRUSTED);
            }
            if !privileged && trust == Trust::Trusted {
                prop_assert_eq!(c.handler == UNTRUSTED, configured && default == Trust::Untrusted);
            }
            prop_assert_eq!(c.warning.is_some(), privileged && trust == Trust::Untrusted);
        }
    }

    #[test]
    fn the_default_level_is_trusted() {
        let plain = Subject { privileged: false, trust: Trust::default() };
        assert_eq!(choose(plain, Trust::default(), true).handler, TRUSTED);
    }
}
