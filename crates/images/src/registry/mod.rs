//! A registry, for the length of one pull.
//!
//! ```text
//! mirror, mirror, …, registry     asked in this order for each document and blob
//!   └─ 401 ─▶ auth.rs: token or basic, for that host only
//!   └─ 3xx ─▶ followed by us; another host gets no Authorization (CVE-2020-15157)
//!   └─ cut ─▶ transfer.rs: Range from where it broke off
//! ```
//!
//! Clients and tokens live as long as the pull, so an idle daemon keeps neither
//! connections nor certificates.

mod auth;
mod http;
mod resolve;
mod transfer;

pub use auth::Auth;

use crate::config::RegistryConfig;
use crate::{ImagesConfig, Reference};
use ::http::HeaderValue;
use auth::Challenge;
use http::{Asked, Clients, Trust};
use reqwest::{Response, StatusCode, Url};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use types::{Error, ErrorKind, Result, ResultExt};

/// Pauses between attempts begin here and double.
const BACKOFF: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// How often one that never answered is asked again: a wrong name or port should
/// be told soon, and a kubelet tries again by itself.
const STRANGER_RETRIES: u32 = 2;

/// One place that has the repository.
#[derive(Debug)]
struct Endpoint {
    base: Url,
    /// The registry itself, the only one that gets the caller's secret.
    origin: bool,
    trust: Trust,
    /// It has answered once: what breaks later is worth patience.
    answered: AtomicBool,
}

/// All that one pull knows of its registry.
pub(crate) struct Session {
    reference: Reference,
    endpoints: Vec<Endpoint>,
    auth: Option<Auth>,
    /// The Authorization that an endpoint accepted, by its index.
    tokens: Mutex<HashMap<usize, HeaderValue>>,
    clients: Clients,
    deadline: Instant,
    retries: u32,
}

impl Session {
    pub(crate) fn new(config: &ImagesConfig, reference: &Reference, auth: Option<Auth>) -> Result<Self> {
        let registry = config.registry(&reference.registry);
        Ok(Self {
            endpoints: endpoints(&reference.registry, &registry, &config.registries)?,
            auth: auth.filter(|a| a.is_for(&reference.registry)),
            reference: reference.clone(),
            tokens: Mutex::default(),
            clients: Clients::new(config.idle_timeout),
            deadline: Instant::now() + config.pull_timeout,
            retries: config.retries,
        })
    }

    /// Asks one endpoint for `path` below the repository.
    async fn get(&self, index: usize, path: &str, accept: &str, from: u64) -> Result<Response> {
        let endpoint = &self.endpoints[index];
        let mut url = endpoint.base.clone();
        let whole = format!("{}/v2/{}/{path}", url.path().trim_end_matches('/'), self.reference.repository);
        url.set_path(&whole);
        if !endpoint.origin {
            // Tells a mirror of several registries which one is meant.
            url.query_pairs_mut().append_pair("ns", &self.reference.registry);
        }
        let known = self.tokens.lock().unwrap_or_else(PoisonError::into_inner).get(&index).cloned();
        let mut asked = Asked { url, accept, from, authorization: known };
        let first = self.send(&asked, &endpoint.trust).await?;
        endpoint.answered.store(true, Ordering::Relaxed);
        if first.response.status() != StatusCode::UNAUTHORIZED || !first.at_home {
            return http::check(first.response).await;
        }
        let challenges = Challenge::read(first.response.headers());
        drop(first);
        let authorization = self.authorise(endpoint, &challenges).await?;
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).insert(index, authorization.clone());
        asked.authorization = Some(authorization);
        http::check(self.send(&asked, &endpoint.trust).await?.response).await
    }

    async fn send(&self, asked: &Asked<'_>, trust: &Trust) -> Result<http::Answer> {
        let sent = tokio::time::timeout_at(self.deadline, self.clients.follow(asked, trust)).await;
        sent.map_err(|_| self.too_late())?
    }

    fn too_late(&self) -> Error {
        Error::deadline("the pull took longer than its bound").hint("raise the images' pull timeout")
    }

    /// The Authorization that answers an endpoint's challenge.
    async fn authorise(&self, endpoint: &Endpoint, challenges: &[Challenge]) -> Result<HeaderValue> {
        // A mirror is another party: the secret is the registry's.
        let auth = self.auth.as_ref().filter(|_| endpoint.origin);
        if let Some(token) = auth.map(|a| &a.registry_token).filter(|t| !t.is_empty()) {
            return auth::bearer(token);
        }
        for challenge in challenges {
            match challenge {
                Challenge::Bearer { realm, service } => {
                    let request = auth::token_request(realm, service, &self.reference.repository, auth)?;
                    if auth.is_some() && endpoint.base.scheme() == "https" && request.url.scheme() != "https" {
                        return Err(denied(format!("{realm} would get the password unencrypted")));
                    }
                    let asked = self.clients.token(request, &endpoint.trust, &endpoint.base);
                    let token = tokio::time::timeout_at(self.deadline, asked).await.map_err(|_| self.too_late())??;
                    return auth::bearer(&token);
                }
                Challenge::Basic => {
                    if let Some(auth) = auth.filter(|a| !a.username.is_empty()) {
                        return auth::basic(auth);
                    }
                }
            }
        }
        let why = if self.auth.is_some() { "the credentials given don't fit" } else { "credentials are needed" };
        Err(denied(why.to_owned()))
    }
}

fn denied(why: String) -> Error {
    Error::new(ErrorKind::PermissionDenied, why)
}

/// True where docker speaks http unless told otherwise.
fn is_loopback(registry: &str) -> bool {
    let host = registry.rsplit_once(':').filter(|(_, p)| p.bytes().all(|b| b.is_ascii_digit()));
    let (host, port) = host.unwrap_or((registry, ""));
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let loopback = host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
    loopback && port != "443"
}

/// The mirrors and then the registry itself. What `configured` says of a mirror's own host goes
/// before what its registry says, so that one can be trusted without the other.
fn endpoints(
    registry: &str,
    config: &RegistryConfig,
    configured: &BTreeMap<String, RegistryConfig>,
) -> Result<Vec<Endpoint>> {
    let mut all = Vec::new();
    let trust_of = |c: &RegistryConfig| Trust { insecure: c.insecure_skip_verify, ca_file: c.ca_file.clone() };
    let own = |mirror: &Url| {
        let host = mirror.host_str()?;
        let with_port = mirror.port_or_known_default().and_then(|port| configured.get(&format!("{host}:{port}")));
        with_port.or_else(|| configured.get(host).filter(|_| mirror.port().is_none()))
    };
    let base = |text: &str| {
        let url = Url::parse(text).context_kind(ErrorKind::InvalidArgument, || format!("read the address {text:?}"))?;
        if matches!(url.scheme(), "http" | "https") && url.has_host() {
            Ok(url)
        } else {
            Err(Error::invalid(format!("the mirror {text:?} is no http or https address")))
        }
    };
    for mirror in &config.mirrors {
        let base = base(mirror)?;
        let trust = trust_of(own(&base).unwrap_or(config));
        all.push(Endpoint { base, origin: false, trust, answered: AtomicBool::default() });
    }
    if !config.mirror_only || all.is_empty() {
        let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
        let scheme = if config.plain_http || is_loopback(registry) { "http" } else { "https" };
        all.push(Endpoint {
            base: base(&format!("{scheme}://{host}"))?,
            origin: true,
            trust: trust_of(config),
            answered: AtomicBool::default(),
        });
    }
    Ok(all)
}

/// Goes through endpoints and attempts, and remembers what went wrong.
struct Attempts<'a> {
    session: &'a Session,
    endpoint: usize,
    failures: u32,
    errors: Vec<Error>,
}

impl<'a> Attempts<'a> {
    fn new(session: &'a Session) -> Self {
        Self { session, endpoint: 0, failures: 0, errors: Vec::new() }
    }

    /// Waits before the next attempt, or gives up with all that went wrong.
    /// Progress made means that the endpoint lives, and begins the count anew.
    async fn failed(&mut self, error: Error, progress: bool) -> Result<()> {
        let all = &self.session.endpoints;
        let last = self.endpoint + 1 == all.len();
        if progress {
            self.failures = 0;
        }
        let bound = match (last, all[self.endpoint].answered.load(Ordering::Relaxed)) {
            (true, true) => self.session.retries,
            (true, false) => self.session.retries.min(STRANGER_RETRIES),
            (false, _) => self.session.retries.min(1),
        };
        if error.kind() == ErrorKind::Unavailable && self.failures < bound {
            let pause = BACKOFF.saturating_mul(1 << self.failures.min(8)).min(BACKOFF_MAX);
            self.failures += 1;
            tracing::debug!(%error, endpoint = http::shown(&all[self.endpoint].base), "trying again");
            return tokio::time::timeout_at(self.session.deadline, tokio::time::sleep(pause))
                .await
                .map_err(|_| self.session.too_late());
        }
        let fatal = matches!(error.kind(), ErrorKind::ResourceExhausted | ErrorKind::DeadlineExceeded);
        self.errors.push(error.within(http::shown(&all[self.endpoint].base).trim_end_matches('/')));
        if last || fatal {
            return Err(summary(std::mem::take(&mut self.errors)));
        }
        self.endpoint += 1;
        self.failures = 0;
        Ok(())
    }
}

/// Nobody has it only if everybody said so; else the first other failure counts.
fn summary(mut errors: Vec<Error>) -> Error {
    if errors.len() == 1 {
        return errors.remove(0);
    }
    let kinds = errors.iter().map(Error::kind);
    let kind = kinds.into_iter().find(|k| *k != ErrorKind::NotFound).unwrap_or(ErrorKind::NotFound);
    let all: Vec<String> = errors.iter().map(ToString::to_string).collect();
    Error::new(kind, all.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_registries_speak_http() {
        for yes in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.3.2.1", "[::1]:5000"] {
            assert!(is_loopback(yes), "{yes}");
        }
        for no in ["localhost:443", "example.com:5000", "10.0.0.1:5000", "docker.io"] {
            assert!(!is_loopback(no), "{no}");
        }
    }

    #[test]
    fn mirrors_come_first_and_the_registry_last() {
        let mut config = RegistryConfig { mirrors: vec!["http://127.0.0.1:5000".into()], ..Default::default() };
        let bases = |c: &RegistryConfig| -> Vec<String> {
            endpoints("docker.io", c, &BTreeMap::new()).unwrap().iter().map(|e| e.base.to_string()).collect()
        };
        assert_eq!(bases(&config), ["http://127.0.0.1:5000/", "https://registry-1.docker.io/"]);
        config.mirror_only = true;
        assert_eq!(bases(&config), ["http://127.0.0.1:5000/"]);
        config.mirrors = vec!["ftp://x".into()];
        assert!(endpoints("docker.io", &config, &BTreeMap::new()).is_err());
    }

    #[test]
    fn a_mirror_is_trusted_as_its_own_host_says() {
        let mirrors = ["https://own.example", "https://own.example:8443", "https://other.example"];
        let config = RegistryConfig { mirrors: mirrors.map(Into::into).into(), ..Default::default() };
        let insecure = RegistryConfig { insecure_skip_verify: true, ..Default::default() };
        let trusts = |config: &RegistryConfig, configured: &[(&str, &RegistryConfig)]| -> Vec<bool> {
            let configured = configured.iter().map(|(host, c)| ((*host).to_owned(), (*c).clone())).collect();
            endpoints("docker.io", config, &configured).unwrap().iter().map(|e| e.trust.insecure).collect()
        };
        assert_eq!(trusts(&config, &[("own.example", &insecure)]), [true, false, false, false]);
        assert_eq!(trusts(&config, &[("own.example:8443", &insecure)]), [false, true, false, false]);
        assert_eq!(trusts(&config, &[("own.example:443", &insecure)]), [true, false, false, false]);
        assert_eq!(trusts(&config, &[("*", &insecure)]), [false; 4]);
        let all = RegistryConfig { insecure_skip_verify: true, ..config };
        assert_eq!(trusts(&all, &[("own.example", &RegistryConfig::default())]), [false, true, true, true]);
    }
}
