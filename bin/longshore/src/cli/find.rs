//! From what people type (a name, an id, the beginning of one) to one pod or
//! container; CRI's own calls want ids.

use super::client::{Answer, Client};
use super::output::shown_id;
use proto::cri::{Container, ListContainersRequest, ListPodSandboxRequest, PodSandbox};
use types::{Error, Result};

/// A pod or a container, so that `stop` and `rm` take either.
#[derive(Debug, Clone, PartialEq)]
pub enum Target {
    /// A pod.
    Pod(PodSandbox),
    /// A container.
    Container(Container),
}

/// Something that can be named.
pub trait Named {
    /// "pod" or "container".
    const KIND: &'static str;
    /// The command that lists what there is.
    const LIST: &'static str;
    /// Its id.
    fn id(&self) -> &str;
    /// Its name.
    fn name(&self) -> &str;
    /// True when it goes by this name.
    fn called(&self, name: &str) -> bool {
        self.name() == name
    }
    /// True when `other` of the same name is an earlier attempt at the same thing.
    fn succeeds(&self, other: &Self) -> bool;
}

impl Named for PodSandbox {
    const KIND: &'static str = "pod";
    const LIST: &'static str = "longshore pods";
    fn id(&self) -> &str {
        &self.id
    }
    fn name(&self) -> &str {
        self.metadata.as_ref().map_or("", |m| &m.name)
    }
    fn called(&self, name: &str) -> bool {
        self.metadata.as_ref().is_some_and(|m| m.name == name || name.split_once('/') == Some((&m.namespace, &m.name)))
    }
    fn succeeds(&self, other: &Self) -> bool {
        let key = |p: &Self| p.metadata.as_ref().map(|m| (m.name.clone(), m.namespace.clone(), m.uid.clone()));
        key(self) == key(other) && self.created_at > other.created_at
    }
}

impl Named for Container {
    const KIND: &'static str = "container";
    const LIST: &'static str = "longshore ps -a";
    fn id(&self) -> &str {
        &self.id
    }
    fn name(&self) -> &str {
        self.metadata.as_ref().map_or("", |m| &m.name)
    }
    fn succeeds(&self, other: &Self) -> bool {
        self.pod_sandbox_id == other.pod_sandbox_id && self.name() == other.name() && self.created_at > other.created_at
    }
}

/// How something may be meant, the strongest rule first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rule {
    /// By its whole id.
    Id,
    /// By its name; of several attempts the last is meant.
    Name,
    /// By the beginning of its id.
    Prefix,
}

/// All of `items` that `given` may mean, by the strongest rule that finds any.
fn matches<'a, T: Named>(given: &str, items: &'a [T]) -> (Rule, Vec<&'a T>) {
    if given.is_empty() {
        return (Rule::Prefix, Vec::new());
    }
    let by = |rule: &dyn Fn(&T) -> bool| -> Vec<&'a T> { items.iter().filter(|i| rule(i)).collect() };
    let exact = by(&|i| i.id() == given);
    if !exact.is_empty() {
        return (Rule::Id, exact);
    }
    let named = by(&|i| i.called(given));
    if !named.is_empty() {
        let latest = |i: &&T| !named.iter().any(|n| n.succeeds(i));
        return (Rule::Name, named.iter().copied().filter(latest).collect());
    }
    (Rule::Prefix, by(&|i| i.id().starts_with(given)))
}

fn unknown(kind: &str, given: &str, list: &str) -> Error {
    Error::not_found(format!("no {kind} has the name or id {given:?}")).hint(format!("'{list}' lists what there is"))
}

fn ambiguous(given: &str, found: &[String]) -> Error {
    let shown = found.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
    let more = if found.len() > 5 { ", …" } else { "" };
    Error::invalid(format!("{given:?} may be any of {}: {shown}{more}", found.len())).hint("give more of the id")
}

fn described<T: Named>(item: &T) -> String {
    format!("{} {} ({})", T::KIND, shown_id(item.id(), false), item.name())
}

/// The one of `items` that `given` means.
///
/// # Errors
/// `NotFound`, or `InvalidArgument` with the candidates where it is ambiguous.
pub fn one<'a, T: Named>(given: &str, items: &'a [T]) -> Result<&'a T> {
    match matches(given, items).1.as_slice() {
        [] => Err(unknown(T::KIND, given, T::LIST)),
        [one] => Ok(one),
        many => Err(ambiguous(given, &many.iter().map(|i| described(*i)).collect::<Vec<_>>())),
    }
}

/// The pod or container that `given` means, by the strongest rule that finds either. A
/// pod wins over its own container of the same name, which is what `run --name` makes.
///
/// # Errors
/// As [`one`].
pub fn target(given: &str, pods: &[PodSandbox], containers: &[Container]) -> Result<Target> {
    let ((pods_by, mut p), (containers_by, mut c)) = (matches(given, pods), matches(given, containers));
    // A container's name is stronger than a pod's id that happens to begin like it.
    if !p.is_empty() && !c.is_empty() {
        let strongest = pods_by.min(containers_by);
        p.retain(|_| pods_by == strongest);
        c.retain(|_| containers_by == strongest);
    }
    match (p.as_slice(), c.as_slice()) {
        ([], []) => Err(unknown("pod or container", given, "longshore ps -a")),
        ([pod], inside) if inside.iter().all(|c| c.pod_sandbox_id == pod.id) => Ok(Target::Pod((*pod).clone())),
        ([], [container]) => Ok(Target::Container((*container).clone())),
        _ => {
            let all = p.iter().map(|i| described(*i)).chain(c.iter().map(|i| described(*i)));
            Err(ambiguous(given, &all.collect::<Vec<_>>()))
        }
    }
}

/// All pods.
///
/// # Errors
/// As the call.
pub async fn pods(client: &mut Client) -> Result<Vec<PodSandbox>> {
    let answer = client.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await;
    Ok(answer.answer(|| "list pods".to_string())?.items)
}

/// All containers.
///
/// # Errors
/// As the call.
pub async fn containers(client: &mut Client) -> Result<Vec<Container>> {
    let answer = client.runtime.list_containers(ListContainersRequest::default()).await;
    Ok(answer.answer(|| "list containers".to_string())?.containers)
}

/// The container that `given` means.
///
/// # Errors
/// As [`one`] and the call.
pub async fn container(client: &mut Client, given: &str) -> Result<Container> {
    one(given, &containers(client).await?).cloned()
}

/// The pod that `given` means.
///
/// # Errors
/// As [`one`] and the call.
pub async fn pod(client: &mut Client, given: &str) -> Result<PodSandbox> {
    one(given, &pods(client).await?).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::cri::{ContainerMetadata, PodSandboxMetadata};

    fn pod(id: &str, name: &str) -> PodSandbox {
        let metadata = PodSandboxMetadata { name: name.into(), namespace: "ns".into(), ..Default::default() };
        PodSandbox { id: id.into(), metadata: Some(metadata), ..Default::default() }
    }

    fn container(id: &str, pod: &str, name: &str, created_at: i64) -> Container {
        let metadata = Some(ContainerMetadata { name: name.into(), attempt: 0 });
        Container { id: id.into(), pod_sandbox_id: pod.into(), metadata, created_at, ..Default::default() }
    }

    #[test]
    fn ids_names_and_prefixes_are_found_in_this_order() {
        let all = [pod("abc1", "web"), pod("abd2", "abc"), pod("web9", "x")];
        assert_eq!(one("abc1", &all).unwrap().id, "abc1");
        assert_eq!(one("web", &all).unwrap().id, "abc1", "a name is stronger than a prefix");
        assert_eq!(one("abc", &all).unwrap().id, "abd2");
        assert_eq!(one("ns/web", &all).unwrap().id, "abc1");
        assert_eq!(one("web9", &all).unwrap().id, "web9");
        assert!(one("", &all).is_err());
    }

    #[test]
    fn an_ambiguous_prefix_names_the_candidates() {
        let all = [pod("abc1", "web"), pod("abd2", "db")];
        let e = one("ab", &all).unwrap_err().to_string();
        assert_eq!(e, "\"ab\" may be any of 2: pod abc1 (web), pod abd2 (db) (give more of the id)");
        let e = one("zz", &all).unwrap_err();
        assert!(e.is_not_found() && e.to_string().contains("no pod has the name or id \"zz\""), "{e}");
    }

    #[test]
    fn the_last_attempt_of_a_container_is_meant() {
        let all = [container("a1", "p", "web", 1), container("a2", "p", "web", 2), container("b1", "q", "db", 3)];
        assert_eq!(one("web", &all).unwrap().id, "a2");
        let all = [container("a1", "p", "web", 1), container("a2", "q", "web", 2)];
        assert!(one("web", &all).is_err(), "two pods have one");
    }

    #[test]
    fn a_pod_wins_over_its_own_container_only() {
        let pods = [pod("p1", "web")];
        let own = [container("c1", "p1", "web", 1)];
        assert_eq!(target("web", &pods, &own).unwrap(), Target::Pod(pods[0].clone()));
        assert_eq!(target("c1", &pods, &own).unwrap(), Target::Container(own[0].clone()));
        let foreign = [container("c1", "p2", "web", 1)];
        assert!(target("web", &pods, &foreign).unwrap_err().to_string().contains("any of 2"));
        assert!(target("nope", &pods, &own).unwrap_err().is_not_found());
    }

    #[test]
    fn a_name_is_stronger_than_the_beginning_of_an_id_of_the_other_kind() {
        let (pods, containers) = ([pod("a1", "web"), pod("c2", "db")], [container("b1", "a1", "a", 1)]);
        assert_eq!(target("a", &pods, &containers).unwrap(), Target::Container(containers[0].clone()));
        assert_eq!(target("a1", &pods, &containers).unwrap(), Target::Pod(pods[0].clone()));
        let containers = [container("web1", "c2", "x", 1), container("c21", "a1", "y", 1)];
        assert_eq!(target("web", &pods, &containers).unwrap(), Target::Pod(pods[0].clone()));
        assert_eq!(target("c2", &pods, &containers).unwrap(), Target::Pod(pods[1].clone()));
        assert!(target("c", &pods, &containers).unwrap_err().to_string().contains("any of 2"));
    }
}
