//! Signals by name and number.

use crate::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// A Linux signal, 1 to 64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Signal(u8);

/// Linux numbers of x86-64 and arm64, in order from 1.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM",
    "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO",
    "PWR", "SYS",
];
const RTMIN: u8 = 34;
const RTMAX: u8 = 64;

impl Signal {
    /// SIGKILL.
    pub const KILL: Signal = Signal(9);
    /// SIGTERM.
    pub const TERM: Signal = Signal(15);
    /// SIGINT.
    pub const INT: Signal = Signal(2);
    /// SIGQUIT.
    pub const QUIT: Signal = Signal(3);
    /// SIGCHLD.
    pub const CHLD: Signal = Signal(17);
    /// Stops a process until SIGCONT; can't be caught.
    pub const STOP: Signal = Signal(19);
    /// SIGUSR1.
    pub const USR1: Signal = Signal(10);

    /// The signal with this number.
    ///
    /// # Errors
    /// `InvalidArgument` outside 1 to 64.
    pub fn from_number(n: u32) -> Result<Self> {
        match u8::try_from(n) {
            Ok(n @ 1..=RTMAX) => Ok(Self(n)),
            _ => Err(Error::invalid(format!("signal {n} does not exist (1 to {RTMAX})"))),
        }
    }

    /// Its number.
    pub fn number(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n @ 1..=31 => write!(f, "SIG{}", NAMES[usize::from(n) - 1]),
            RTMIN => f.write_str("SIGRTMIN"),
            n @ 35..=63 => write!(f, "SIGRTMIN+{}", n - RTMIN),
            RTMAX => f.write_str("SIGRTMAX"),
            n => write!(f, "SIG{n}"),
        }
    }
}

impl FromStr for Signal {
    type Err = Error;

    /// Reads `15`, `TERM`, `SIGTERM`, `sigterm`, `RTMIN+3`, `SIGRTMAX-2`.
    fn from_str(text: &str) -> Result<Self> {
        let unknown = || Error::invalid(format!("unknown signal {text:?}"));
        if let Ok(n) = text.parse::<u32>() {
            return Self::from_number(n);
        }
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        let offset = |rest: &str, sign: char| -> Result<u8> {
            match rest {
                "" => Ok(0),
                r => r.strip_prefix(sign).and_then(|d| d.parse().ok()).ok_or_else(unknown),
            }
        };
        let number = if let Some(rest) = name.strip_prefix("RTMIN") {
            RTMIN.checked_add(offset(rest, '+')?)
        } else if let Some(rest) = name.strip_prefix("RTMAX") {
            RTMAX.checked_sub(offset(rest, '-')?).filter(|n| *n >= RTMIN)
        } else {
            match name {
                "IOT" => Some(6),
                "CLD" => Some(17),
                "POLL" => Some(29),
                _ => NAMES.iter().position(|n| *n == name).and_then(|i| u8::try_from(i + 1).ok()),
            }
        };
        number.filter(|n| *n <= RTMAX).map(Self).ok_or_else(unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_survives_its_name() {
        for n in (1..=31).chain(34..=64) {
            let s = Signal::from_number(n).unwrap();
            assert_eq!(s.to_string().parse::<Signal>().unwrap(), s);
        }
    }

    #[test]
    fn names_are_read_in_every_habit() {
        for (text, n) in [("TERM", 15), ("SIGKILL", 9), ("sigusr1", 10), ("3", 3), ("RTMIN+3", 37), ("SIGRTMAX-2", 62)]
        {
            assert_eq!(text.parse::<Signal>().unwrap().number(), n, "{text}");
        }
        for bad in ["", "0", "65", "NOPE", "RTMIN+40", "RTMAX-99", "SIG"] {
            assert!(bad.parse::<Signal>().is_err(), "{bad}");
        }
    }
}
