//! Identifiers: ours are 64 hex digits, those of others follow containerd's
//! identifier grammar (behaviours.md section 3).

use crate::{Error, Result};

/// The longest identifier that containerd's grammar allows, in bytes.
const LONGEST: usize = 76;

/// A new random id: 32 bytes from the kernel as 64 lower-case hex digits.
///
/// # Errors
/// Fails only where the kernel has no `getrandom`.
pub fn new_id() -> Result<String> {
    let mut raw = [0u8; 32];
    let mut filled = 0;
    while filled < raw.len() {
        let n = rustix::rand::getrandom(&mut raw[filled..], rustix::rand::GetRandomFlags::empty())
            .map_err(|e| Error::internal("read random bytes for an id").because(e))?;
        filled += n;
    }
    Ok(raw.iter().map(|b| format!("{b:02x}")).collect())
}

/// Checks an identifier that came from outside: `[A-Za-z0-9]+`, parts joined by
/// one of `.`, `_`, `-` each, at most 76 bytes.
///
/// # Errors
/// `InvalidArgument`, naming `what` and the offending text.
pub fn check_identifier(what: &str, id: &str) -> Result<()> {
    let shown: String = id.chars().take(LONGEST + 1).collect();
    if id.is_empty() {
        return Err(Error::invalid(format!("{what} is empty")));
    }
    if id.len() > LONGEST {
        return Err(Error::invalid(format!("{what} {shown:?}… is longer than {LONGEST} bytes")));
    }
    let whole_parts =
        id.split(['.', '_', '-']).all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric()));
    if whole_parts {
        Ok(())
    } else {
        Err(Error::invalid(format!(
            "{what} {shown:?} is no identifier: letters and digits, with single '.', '_' or '-' inside"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_follow_the_grammar() {
        for good in ["a", "a-b", "0.1_2", &"x".repeat(76)] {
            assert!(check_identifier("id", good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "a--b", "a/b", "a b", "é", "..", &"x".repeat(77)] {
            assert!(check_identifier("id", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn new_ids_are_64_hex_digits_and_differ() {
        let (a, b) = (new_id().unwrap(), new_id().unwrap());
        assert_ne!(a, b);
        assert!(a.len() == 64 && a.bytes().all(|c| c.is_ascii_hexdigit()));
        assert!(check_identifier("id", &a).is_ok());
    }
}
