//! Digests: `sha256:…` and `sha512:…`.

use sha2::Digest as _;
use std::fmt;
use std::str::FromStr;
use types::{Error, Result};

/// A digest whose text has been checked.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(String);

impl Digest {
    /// The sha256 of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(format!("sha256:{}", hex::encode(sha2::Sha256::digest(bytes))))
    }

    /// `sha256:…`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The algorithm's name.
    pub fn algorithm(&self) -> &str {
        self.0.split_once(':').map_or("", |(a, _)| a)
    }

    /// The hexadecimal part.
    pub fn hex(&self) -> &str {
        self.0.split_once(':').map_or("", |(_, h)| h)
    }

    /// What computes a digest to compare with this one.
    pub fn hasher(&self) -> Hasher {
        if self.algorithm() == "sha512" { Hasher::Sha512(Box::default()) } else { Hasher::sha256() }
    }

    /// Compares with what was computed of `what`.
    ///
    /// # Errors
    /// `Internal`, naming both.
    pub fn verify(&self, computed: &Digest, what: &str) -> Result<()> {
        if self == computed {
            return Ok(());
        }
        Err(Error::internal(format!("{what} has digest {computed}, not {self}"))
            .hint("it was corrupted or tampered with on the way; try again"))
    }

    /// Compares with the digest of `bytes`.
    ///
    /// # Errors
    /// `Internal`, naming both.
    pub fn verify_bytes(&self, bytes: &[u8], what: &str) -> Result<()> {
        let mut hasher = self.hasher();
        hasher.update(bytes);
        self.verify(&hasher.finish(), what)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let length = match text.split_once(':') {
            Some(("sha256", _)) => 64,
            Some(("sha512", _)) => 128,
            _ => 0,
        };
        let hex = text.split_once(':').map_or("", |(_, h)| h);
        let lower_hex = hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if length == 0 || hex.len() != length || !lower_hex {
            let shown: String = text.chars().take(140).collect();
            return Err(Error::invalid(format!(
                "{shown:?} is no digest: sha256: or sha512: and lower-case hex digits"
            )));
        }
        Ok(Self(text.to_owned()))
    }
}

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A digest in the making.
#[derive(Clone)]
pub enum Hasher {
    /// sha256.
    Sha256(Box<sha2::Sha256>),
    /// sha512.
    Sha512(Box<sha2::Sha512>),
}

impl Hasher {
    /// A sha256 in the making.
    pub fn sha256() -> Self {
        Self::Sha256(Box::default())
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(h) => h.update(bytes),
            Self::Sha512(h) => h.update(bytes),
        }
    }

    /// The digest of all that was added.
    pub fn finish(self) -> Digest {
        Digest(match self {
            Self::Sha256(h) => format!("sha256:{}", hex::encode(h.finalize())),
            Self::Sha512(h) => format!("sha512:{}", hex::encode(h.finalize())),
        })
    }
}

/// A layer's chain id: the digest of it and all beneath it (image spec, "Layer ChainID").
pub(crate) fn chain_ids(diff_ids: &[Digest]) -> Vec<String> {
    let mut chain: Vec<String> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let next = match chain.last() {
            None => diff_id.to_string(),
            Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()).to_string(),
        };
        chain.push(next);
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_lower_case_digests_parse() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").as_str(), empty);
        assert_eq!(empty.parse::<Digest>().unwrap(), Digest::of(b""));
        for bad in ["", "sha256:", "md5:aa", &empty.to_uppercase(), &empty[..70], "sha256:../../etc/passwd"] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
        let long: Digest = format!("sha512:{}", "a".repeat(128)).parse().unwrap();
        assert!(long.verify_bytes(b"x", "x").is_err());
    }
}
