//! Faults of the controller's certificate: a foreign authority or name, or a wrong clock on this node.

use std::time::Duration;

use rustls::CertificateError;

/// Fault of the certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Distrust {
    /// Another authority issued it, or it is for another name.
    NotTheControllers,
    /// It becomes valid this long after the time of the node's clock. The controller dates its certificate back by an
    /// hour, so the clock is behind by more than that.
    NotValidYet(Option<Duration>),
    /// It expired this long before the time of the node's clock. The controller renews it months before.
    Expired(Option<Duration>),
}

impl Distrust {
    /// Finds the fault in a connection error; `None` if the certificate is not the cause.
    pub(super) fn of(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            // The source of an io::Error is the source of its inner error: check the inner error itself.
            let carried = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
            let tls = carried.and_then(|inner| inner.downcast_ref::<rustls::Error>());
            if let Some(rustls::Error::InvalidCertificate(fault)) = tls {
                return Some(Self::from(fault));
            }
            next = error.source();
        }
        None
    }

    /// Returns the CamelCase reason.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::NotTheControllers => "ControllerUntrusted",
            Self::NotValidYet(_) | Self::Expired(_) => "ClockSkew",
        }
    }

    /// Returns an explanation with the remedy, if the fault is a clock.
    pub(super) fn advice(self) -> Option<String> {
        let span = |span: Option<Duration>| span.map_or_else(|| "an unknown time".to_owned(), duration);
        match self {
            Self::NotTheControllers => None,
            Self::NotValidYet(early) => Some(format!(
                "this node's clock is behind: the controller's certificate becomes valid in {}; \
                 set the clock (NTP)",
                span(early)
            )),
            Self::Expired(late) => Some(format!(
                "this node's clock is ahead: the controller's certificate expired {} ago; set the clock \
                 (NTP). If the clock is right, the controller could not renew its certificate; its log says why",
                span(late)
            )),
        }
    }
}

impl From<&CertificateError> for Distrust {
    fn from(fault: &CertificateError) -> Self {
        let between = |from: &rustls_pki_types::UnixTime, to: &rustls_pki_types::UnixTime| {
            Some(Duration::from_secs(to.as_secs().saturating_sub(from.as_secs())))
        };
        match fault {
            CertificateError::NotValidYet => Self::NotValidYet(None),
            CertificateError::NotValidYetContext { time, not_before } => {
                Self::NotValidYet(between(time, not_before))
            }
            CertificateError::Expired => Self::Expired(None),
            CertificateError::ExpiredContext { time, not_after } => Self::Expired(between(not_after, time)),
            _ => Self::NotTheControllers,
        }
    }
}

/// Formats the two largest units: "3 d 4 h", "5 h 12 min", "40 s".
fn duration(span: Duration) -> String {
    let seconds = span.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min"),
        (0, _, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_formatted_with_two_units() {
        for (seconds, text) in [(40, "40 s"), (61, "1 min"), (18_720, "5 h 12 min"), (273_600, "3 d 4 h")] {
            assert_eq!(duration(Duration::from_secs(seconds)), text);
        }
    }
}
