//! CRI's own numbering of signals, by name.

use types::Signal;

/// The Linux signal behind CRI's enum value; `None` for "the runtime's default".
pub fn from_cri(signal: proto::cri::Signal) -> Option<Signal> {
    // SIGNAL_SIGRTMINPLUS3, SIGNAL_SIGRTMAXMINUS2, SIGNAL_SIGTERM, …
    let name = signal.as_str_name().strip_prefix("SIGNAL_")?;
    name.replace("PLUS", "+").replace("MINUS", "-").parse().ok()
}

/// CRI's enum value of a signal given by name or number.
pub fn to_cri(name: &str) -> proto::cri::Signal {
    let Ok(signal) = name.parse::<Signal>() else { return proto::cri::Signal::RuntimeDefault };
    (1..=65)
        .filter_map(|n| proto::cri::Signal::try_from(n).ok())
        .find(|s| from_cri(*s) == Some(signal))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cri_signal_has_a_number() {
        for n in 1..=65 {
            let s = proto::cri::Signal::try_from(n).unwrap();
            assert!(from_cri(s).is_some(), "{s:?}");
        }
        assert_eq!(from_cri(proto::cri::Signal::RuntimeDefault), None);
        assert_eq!(from_cri(proto::cri::Signal::Sigrtmaxminus14).unwrap().number(), 50);
        assert_eq!(to_cri("SIGQUIT"), proto::cri::Signal::Sigquit);
        assert_eq!(to_cri(""), proto::cri::Signal::RuntimeDefault);
    }
}
