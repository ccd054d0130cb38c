//! Requests and their redirects.

use super::auth::{TokenReply, TokenRequest};
use http::HeaderValue;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, LOCATION, RANGE};
use reqwest::redirect::Policy;
use reqwest::{Certificate, Client, RequestBuilder, Response, StatusCode, Url};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use types::{Error, ErrorKind, Result, ResultExt};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const REDIRECTS_MAX: usize = 10;
/// How much of a refusal's text is read, in bytes.
const REFUSAL_MAX: u64 = 4 << 10;
/// The largest answer of a token server, in bytes.
const TOKEN_MAX: u64 = 1 << 20;

/// Whose certificates are good for a host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Trust {
    pub insecure: bool,
    pub ca_file: Option<PathBuf>,
}

/// A request.
pub(super) struct Asked<'a> {
    pub url: Url,
    pub accept: &'a str,
    /// The first byte wanted.
    pub from: u64,
    pub authorization: Option<HeaderValue>,
}

/// An answer, and whether the host that was asked gave it.
pub(super) struct Answer {
    pub response: Response,
    pub at_home: bool,
}

/// What makes two clients different.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Kind {
    /// Needs no certificates at all, so a node without any can pull over http.
    plain: bool,
    /// No proxy stands between us and ourselves.
    loopback: bool,
    trust: Trust,
}

/// Clients are made when first needed.
pub(super) struct Clients {
    idle_timeout: Duration,
    made: Mutex<HashMap<Kind, Client>>,
}

fn same_place(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme() && a.host() == b.host() && a.port_or_known_default() == b.port_or_known_default()
}

/// A URL as it may be shown: signed addresses carry secrets in their query,
/// mirrors of a configuration before their host.
pub(super) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.to_string()
}

impl Clients {
    pub(super) fn new(idle_timeout: Duration) -> Self {
        Self { idle_timeout, made: Mutex::default() }
    }

    fn client(&self, url: &Url, trust: &Trust) -> Result<Client> {
        let plain = url.scheme() == "http";
        let loopback = match url.host_str().map(|h| h.trim_start_matches('[').trim_end_matches(']')) {
            Some("localhost") => true,
            Some(host) => host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback()),
            None => false,
        };
        let trust = if plain { Trust::default() } else { trust.clone() };
        let kind = Kind { plain, loopback, trust };
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = made.get(&kind) {
            return Ok(client.clone());
        }
        let mut builder = Client::builder()
            .user_agent(concat!("longshore/", env!("CARGO_PKG_VERSION")))
            .redirect(Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(self.idle_timeout);
        if kind.loopback {
            builder = builder.no_proxy();
        }
        // A client for http verifies nothing and is never given anything else.
        if kind.plain || kind.trust.insecure {
            builder = builder.tls_danger_accept_invalid_certs(true);
        }
        if let Some(file) = &kind.trust.ca_file {
            let what = || format!("read the certificate authorities of {}", file.display());
            let pem = std::fs::read(file).context(what)?;
            let certificates = Certificate::from_pem_bundle(&pem).context(what)?;
            builder = builder.tls_certs_merge(certificates);
        }
        let client = builder.build().context(|| "make an http client".into())?;
        made.insert(kind, client.clone());
        Ok(client)
    }

    /// Sends a GET and follows redirects. The Authorization goes only to the
    /// place that was asked (CVE-2020-15157), and nothing goes from https to http.
    pub(super) async fn follow(&self, asked: &Asked<'_>, trust: &Trust) -> Result<Answer> {
        let mut url = asked.url.clone();
        for _ in 0..REDIRECTS_MAX {
            let at_home = same_place(&url, &asked.url);
            // What was configured for a registry holds for no other host.
            let trust = if at_home { trust.clone() } else { Trust::default() };
            let mut request = self.client(&url, &trust)?.get(url.clone());
            if !asked.accept.is_empty() {
                request = request.header(ACCEPT, asked.accept);
            }
            if asked.from > 0 {
                request = request.header(RANGE, format!("bytes={}-", asked.from));
            }
            if let Some(authorization) = asked.authorization.as_ref().filter(|_| at_home) {
                request = request.header(AUTHORIZATION, authorization.clone());
            }
            let response = send(request, &url).await?;
            if !response.status().is_redirection() {
                return Ok(Answer { response, at_home });
            }
            let target = response.headers().get(LOCATION).and_then(|l| l.to_str().ok());
            let next = target.and_then(|l| url.join(l).ok()).filter(|u| matches!(u.scheme(), "http" | "https"));
            let Some(next) = next else {
                return Err(Error::unavailable(format!("{} redirects to nowhere", shown(&url))));
            };
            if url.scheme() == "https" && next.scheme() == "http" {
                return Err(super::denied(format!("{} redirects from https to http", shown(&url))));
            }
            url = next;
        }
        Err(Error::unavailable(format!("{} redirects more than {REDIRECTS_MAX} times", shown(&asked.url))))
    }

    /// Gets a token. Redirects aren't followed: the request may carry a password.
    pub(super) async fn token(&self, request: TokenRequest, trust: &Trust, home: &Url) -> Result<String> {
        let trust = if same_place(&request.url, home) { trust.clone() } else { Trust::default() };
        let client = self.client(&request.url, &trust)?;
        let mut builder = match request.form {
            Some(form) => {
                client.post(request.url.clone()).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form)
            }
            None => client.get(request.url.clone()),
        };
        if let Some(authorization) = request.authorization {
            builder = builder.header(AUTHORIZATION, authorization);
        }
        let what = || format!("get a token from {}", shown(&request.url));
        let response = check(send(builder, &request.url).await?).await.map_err(|e| e.within(what()))?;
        let body = body(response, TOKEN_MAX).await.map_err(|e| e.within(what()))?;
        serde_json::from_slice::<TokenReply>(&body)
            .context_kind(ErrorKind::PermissionDenied, what)?
            .token()
            .map_err(|e| e.within(what()))
    }
}

async fn send(request: RequestBuilder, url: &Url) -> Result<Response> {
    request.send().await.map_err(|e| broken(e, &format!("ask {}", shown(url))))
}

/// A failure of the connection; its URL may carry secrets.
pub(super) fn broken(e: reqwest::Error, what: &str) -> Error {
    let e = e.without_url();
    let why = if e.is_timeout() { "no byte came in time" } else { "the connection failed" };
    Error::unavailable(format!("{what}: {why}")).because(e)
}

/// Reads a body of at most `most` bytes.
pub(super) async fn body(mut response: Response, most: u64) -> Result<Vec<u8>> {
    let over = || Error::new(ErrorKind::ResourceExhausted, format!("the answer is over the bound of {most} bytes"));
    if response.content_length().is_some_and(|n| n > most) {
        return Err(over());
    }
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|e| broken(e, "read the answer"))? {
        if (body.len() + chunk.len()) as u64 > most {
            return Err(over());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// Turns a refusal into an error that quotes it.
pub(super) async fn check(response: Response) -> Result<Response> {
    let status = response.status();
    let kind = match status {
        StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Ok(response),
        StatusCode::NOT_FOUND => ErrorKind::NotFound,
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ErrorKind::PermissionDenied,
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS | StatusCode::RANGE_NOT_SATISFIABLE => {
            ErrorKind::Unavailable
        }
        s if s.is_server_error() => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    };
    let text = body(response, REFUSAL_MAX).await.unwrap_or_default();
    let text: String = String::from_utf8_lossy(&text).chars().filter(|c| !c.is_control()).take(500).collect();
    Err(Error::new(kind, format!("the answer is {status}: {}", text.trim())))
}
