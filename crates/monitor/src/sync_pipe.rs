//! The lines that the caller reads: one JSON object each (behaviours.md section 2).

use crate::settings::Api;
use std::fmt::Write;
use std::os::fd::OwnedFd;

/// The pipe to the caller; silent where there is none, or once it is broken.
#[derive(Debug)]
pub struct SyncPipe {
    fd: Option<OwnedFd>,
    key: &'static str,
}

impl SyncPipe {
    /// A pipe whose lines have the key of this kind of call.
    pub fn new(fd: Option<OwnedFd>, api: Api, exec: bool) -> Self {
        let key = match (api, exec) {
            (Api::Current, _) => "data",
            (Api::Legacy, true) => "exit_code",
            (Api::Legacy, false) => "pid",
        };
        Self { fd, key }
    }

    /// Sends one line; a caller that has gone is no fault.
    pub fn send(&mut self, value: i32, message: Option<&str>) {
        let Some(fd) = &self.fd else { return };
        let line = line(self.key, value, message);
        let mut rest = line.as_bytes();
        while !rest.is_empty() {
            match rustix::io::retry_on_intr(|| rustix::io::write(fd, rest)) {
                Ok(n) => rest = &rest[n..],
                Err(e) => {
                    crate::say::warn(format_args!("the caller's sync pipe took no answer: {e}"));
                    self.fd = None;
                    return;
                }
            }
        }
    }
}

fn line(key: &str, value: i32, message: Option<&str>) -> String {
    let mut text = format!("{{\"{key}\": {value}");
    if let Some(message) = message.filter(|m| !m.is_empty()) {
        text.push_str(", \"message\": \"");
        for c in message.chars() {
            match c {
                '"' | '\\' => text.extend(['\\', c]),
                '\n' => text.push_str("\\n"),
                '\r' => text.push_str("\\r"),
                '\t' => text.push_str("\\t"),
                // Writing to a String can't fail.
                c if u32::from(c) < 0x20 || c == '\x7f' => drop(write!(text, "\\u{:04x}", u32::from(c))),
                c => text.push(c),
            }
        }
        text.push('"');
    }
    text.push_str("}\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_have_the_call_s_key() {
        assert_eq!(line("pid", 12, None), "{\"pid\": 12}\n");
        assert_eq!(line("data", -1, Some("a \"b\"\n")), "{\"data\": -1, \"message\": \"a \\\"b\\\"\\n\"}\n");
        assert_eq!(line("data", 0, Some("")), "{\"data\": 0}\n");
        let key = |api, exec| SyncPipe::new(None, api, exec).key;
        assert_eq!((key(Api::Legacy, false), key(Api::Legacy, true)), ("pid", "exit_code"));
        assert_eq!((key(Api::Current, false), key(Api::Current, true)), ("data", "data"));
    }

    proptest! {
        #[test]
        fn any_message_is_one_line_of_json(message in any::<String>(), value in any::<i32>()) {
            let text = line("data", value, Some(&message));
            prop_assert_eq!(text.matches('\n').count(), 1);
            let json: serde_json::Value = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(json["data"].as_i64(), Some(i64::from(value)));
            prop_assert_eq!(json["message"].as_str().unwrap_or(""), message);
        }
    }
}
