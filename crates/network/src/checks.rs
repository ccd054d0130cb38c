//! What is known of pods' networks as they were last looked at.

use std::collections::{BTreeMap, BTreeSet};

/// So many pods are named in one message.
const NAMED: usize = 3;

/// Pods whose network is not as it was made, and why.
#[derive(Debug, Default)]
pub(crate) struct Checks {
    /// Pods that are being looked at. One that is detached meanwhile is none any more:
    /// what is found of it then doesn't count.
    under_way: BTreeSet<String>,
    amiss: BTreeMap<String, String>,
}

impl Checks {
    /// A pod is looked at; [`Self::note`] tells what was found.
    pub(crate) fn begin(&mut self, pod: &str) {
        self.under_way.insert(pod.to_owned());
    }

    pub(crate) fn note(&mut self, pod: &str, found: Option<String>) {
        let counts = self.under_way.contains(pod);
        self.forget(pod);
        if let Some(found) = found.filter(|_| counts) {
            self.amiss.insert(pod.to_owned(), found);
        }
    }

    /// A pod was detached.
    pub(crate) fn forget(&mut self, pod: &str) {
        self.under_way.remove(pod);
        self.amiss.remove(pod);
    }

    pub(crate) fn amiss(&self) -> &BTreeMap<String, String> {
        &self.amiss
    }

    /// The first pods whose network is amiss, and how many more there are.
    pub(crate) fn message(&self) -> Option<String> {
        let named = self.amiss.iter().take(NAMED);
        let named = named.map(|(pod, why)| format!("the network of pod {pod:.12} is amiss: {why}"));
        let more = self.amiss.len().saturating_sub(NAMED);
        let more = (more > 0).then(|| format!("and {more} more pods"));
        let parts: Vec<String> = named.chain(more).collect();
        (!parts.is_empty()).then(|| parts.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_found_of_a_pod_that_was_detached_meanwhile_does_not_count() {
        let mut checks = Checks::default();
        checks.begin("a");
        checks.begin("b");
        checks.forget("a");
        checks.note("a", Some("its link is gone".into()));
        checks.note("b", Some("its link is down".into()));
        assert_eq!(checks.message().unwrap(), "the network of pod b is amiss: its link is down");
        checks.begin("b");
        checks.note("b", None);
        assert_eq!(checks.message(), None);
        for pod in ["a", "b", "c", "d", "e"] {
            checks.begin(pod);
            checks.note(pod, Some("x".into()));
        }
        assert!(checks.message().unwrap().ends_with("and 2 more pods"));
    }
}
