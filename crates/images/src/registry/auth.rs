//! Who we say we are: CRI's credentials, challenges, tokens.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::WWW_AUTHENTICATE;
use http::{HeaderMap, HeaderValue};
use reqwest::Url;
use serde::Deserialize;
use std::fmt;
use types::{Error, ErrorKind, Result, ResultExt};

/// A caller's credentials, as CRI's `AuthConfig` has them; "" is absent.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Auth {
    /// User name.
    pub username: String,
    /// Password.
    pub password: String,
    /// A refresh token, for which the registry's token server gives others.
    pub identity_token: String,
    /// A token to be sent as it is.
    pub registry_token: String,
    /// The registry that these are for; any where absent.
    pub server_address: String,
}

/// Secrets are never printed.
impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth").field("username", &self.username).finish_non_exhaustive()
    }
}

impl Auth {
    /// Credentials from CRI's fields; `auth` is base64 of `user:password` and
    /// counts where those two are absent. Nothing in them is `None`.
    ///
    /// # Errors
    /// `InvalidArgument` for an `auth` that is no such thing.
    pub fn from_cri(
        username: &str,
        password: &str,
        auth: &str,
        server_address: &str,
        identity_token: &str,
        registry_token: &str,
    ) -> Result<Option<Self>> {
        let mut made = Self {
            username: username.into(),
            password: password.into(),
            identity_token: identity_token.into(),
            registry_token: registry_token.into(),
            server_address: server_address.into(),
        };
        if made.username.is_empty() && !auth.is_empty() {
            let wrong = || Error::invalid("the credentials' auth field is no base64 of user:password");
            let text = String::from_utf8(STANDARD.decode(auth.trim()).map_err(|_| wrong())?).map_err(|_| wrong())?;
            let (user, password) = text.split_once(':').ok_or_else(wrong)?;
            (made.username, made.password) = (user.into(), password.trim_end_matches('\0').into());
        }
        let any = [&made.username, &made.identity_token, &made.registry_token].iter().any(|f| !f.is_empty());
        Ok(any.then_some(made))
    }

    /// False when they are another registry's.
    pub(super) fn is_for(&self, registry: &str) -> bool {
        let host = |text: &str| {
            let text = text.split_once("://").map_or(text, |(_, rest)| rest);
            let host = text.split('/').next().unwrap_or_default().to_ascii_lowercase();
            match host.as_str() {
                "index.docker.io" | "registry-1.docker.io" | "registry.docker.io" => "docker.io".to_owned(),
                _ => host,
            }
        };
        self.server_address.is_empty() || host(&self.server_address) == host(registry)
    }
}

/// What a 401 asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Bearer { realm: String, service: String },
    Basic,
}

impl Challenge {
    /// All that are understood, in the order given.
    pub(super) fn read(headers: &HeaderMap) -> Vec<Self> {
        let texts = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|v| v.to_str().ok());
        texts
            .filter_map(|text| {
                let (scheme, rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
                if scheme.eq_ignore_ascii_case("basic") {
                    return Some(Self::Basic);
                }
                if !scheme.eq_ignore_ascii_case("bearer") {
                    return None;
                }
                let realm = parameter(rest, "realm")?;
                Some(Self::Bearer { realm, service: parameter(rest, "service").unwrap_or_default() })
            })
            .collect()
    }
}

/// The value of `key` in `a="b",c=d`.
fn parameter(text: &str, key: &str) -> Option<String> {
    let mut rest = text;
    while let Some((name, after)) = rest.split_once('=') {
        let (value, next) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => after.split_once(',').map_or((after, ""), |(v, n)| (v, n)),
        };
        if name.trim_matches([' ', ',']).eq_ignore_ascii_case(key) {
            return Some(value.trim().to_owned());
        }
        rest = next;
    }
    None
}

/// A request to a token server.
pub(super) struct TokenRequest {
    pub url: Url,
    /// A form to be posted, where there is a refresh token.
    pub form: Option<String>,
    pub authorization: Option<HeaderValue>,
}

/// Asks for the right to pull `repository` and nothing else, whatever scope the
/// challenge names: with another the answer would be worth stealing.
pub(super) fn token_request(realm: &str, service: &str, repository: &str, auth: Option<&Auth>) -> Result<TokenRequest> {
    let mut url = Url::parse(realm)
        .context_kind(ErrorKind::PermissionDenied, || format!("read the token server's address {realm:?}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(super::denied(format!("the token server's address {realm:?} is neither http nor https")));
    }
    let scope = format!("repository:{repository}:pull");
    if let Some(auth) = auth.filter(|a| !a.identity_token.is_empty()) {
        let mut form = Url::parse("form:/").context(|| "make a form".into())?;
        form.query_pairs_mut()
            .append_pair("grant_type", "refresh_token")
            .append_pair("service", service)
            .append_pair("client_id", "longshore")
            .append_pair("scope", &scope)
            .append_pair("refresh_token", &auth.identity_token);
        return Ok(TokenRequest { form: form.query().map(str::to_owned), url, authorization: None });
    }
    url.query_pairs_mut().append_pair("scope", &scope);
    if !service.is_empty() {
        url.query_pairs_mut().append_pair("service", service);
    }
    let authorization = auth.filter(|a| !a.username.is_empty()).map(basic).transpose()?;
    Ok(TokenRequest { url, form: None, authorization })
}

/// A token server's answer.
#[derive(Deserialize)]
pub(super) struct TokenReply {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
}

impl TokenReply {
    pub(super) fn token(self) -> Result<String> {
        let token = self.token.filter(|t| !t.is_empty()).or(self.access_token);
        token.ok_or_else(|| super::denied("the token server's answer has no token".into()))
    }
}

/// `Authorization: Basic …`.
pub(super) fn basic(auth: &Auth) -> Result<HeaderValue> {
    secret(format!("Basic {}", STANDARD.encode(format!("{}:{}", auth.username, auth.password))))
}

/// `Authorization: Bearer …`.
pub(super) fn bearer(token: &str) -> Result<HeaderValue> {
    secret(format!("Bearer {token}"))
}

fn secret(text: String) -> Result<HeaderValue> {
    let mut value =
        HeaderValue::try_from(text).map_err(|_| super::denied("the credentials don't fit into a header".into()))?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let mut headers = HeaderMap::new();
        let bearer = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="a:b,c""#;
        headers.append(WWW_AUTHENTICATE, HeaderValue::from_static(bearer));
        headers.append(WWW_AUTHENTICATE, HeaderValue::from_static("basic realm=x"));
        headers.append(WWW_AUTHENTICATE, HeaderValue::from_static("Negotiate"));
        let realm = "https://auth.docker.io/token".to_owned();
        let expected = [Challenge::Bearer { realm, service: "registry.docker.io".into() }, Challenge::Basic];
        assert_eq!(Challenge::read(&headers), expected);
    }

    #[test]
    fn credentials_come_in_cris_shapes() {
        assert_eq!(Auth::from_cri("", "", "", "x.io", "", "").unwrap(), None);
        let auth = Auth::from_cri("", "", &STANDARD.encode("user:pass:word"), "", "", "").unwrap().unwrap();
        assert_eq!((auth.username.as_str(), auth.password.as_str()), ("user", "pass:word"));
        assert!(Auth::from_cri("", "", "%%%", "", "", "").is_err());
        assert!(!format!("{auth:?}").contains("word"));
    }

    #[test]
    fn credentials_of_another_registry_are_not_used() {
        let auth = |server: &str| Auth { server_address: server.into(), ..Auth::default() };
        assert!(auth("https://index.docker.io/v1/").is_for("docker.io"));
        assert!(auth("q.io:5000").is_for("q.io:5000"));
        assert!(!auth("q.io").is_for("evil.io"));
    }

    #[test]
    fn the_scope_is_ours() {
        let request = token_request("http://a/token?scope=repository:other:push", "svc", "lib/x", None).unwrap();
        assert!(request.url.query().unwrap().contains("scope=repository%3Alib%2Fx%3Apull"));
    }
}
