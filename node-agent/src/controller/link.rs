//! Status of the link to the controller, served at `/connection` on the health port.
//!
//! An agent without a controller cannot report that through the controller. The controller queries `/connection` of
//! absent agents, and operators can do so as well. Health and liveness do not depend on the link, because the data plane
//! works without a controller.

use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

/// Maximum length of a detail in bytes.
const DETAIL_LIMIT: usize = 512;

/// Kind of missing stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Absence {
    /// No attempt has finished yet.
    Unknown,
    /// The controller is unreachable; a later attempt may succeed.
    ControllerAway,
    /// No attempt can succeed with the current files, credentials or version.
    Unusable,
}

/// Response of `/connection`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct ContactState {
    /// A controller's stream is open.
    pub connected: bool,
    /// CamelCase reason; empty while connected.
    pub reason: &'static str,
    /// Address of the controller while connected, else the error; at most 512 bytes.
    pub detail: String,
    /// `None` while connected.
    #[serde(skip)]
    pub(crate) absence: Option<Absence>,
}

impl ContactState {
    /// Returns whether the agent is connected, or would be if a controller were reachable.
    #[must_use]
    pub(crate) fn is_usable(&self) -> bool {
        matches!(self.absence, None | Some(Absence::ControllerAway))
    }
}

/// Latest status, shared by the session and the health server.
#[derive(Debug, Clone)]
pub struct Contact(Arc<Mutex<ContactState>>);

impl Default for Contact {
    fn default() -> Self {
        let detail = "no attempt to connect has finished yet".to_owned();
        Self(Arc::new(Mutex::new(ContactState {
            connected: false,
            reason: "Starting",
            detail,
            absence: Some(Absence::Unknown),
        })))
    }
}

impl Contact {
    /// Notes an open stream to the controller at `address`.
    pub fn made(&self, address: &str) {
        self.set(ContactState { connected: true, reason: "", detail: shortened(address), absence: None });
    }

    /// Notes a missing stream.
    pub(crate) fn lost(&self, reason: &'static str, absence: Absence, detail: &str) {
        let (detail, absence) = (shortened(detail), Some(absence));
        self.set(ContactState { connected: false, reason, detail, absence });
    }

    /// Returns the latest status.
    #[must_use]
    pub(crate) fn state(&self) -> ContactState {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, state: ContactState) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }
}

fn shortened(text: &str) -> String {
    text.chars()
        .scan(0, |length, letter| {
            *length += letter.len_utf8();
            (*length <= DETAIL_LIMIT).then_some(letter)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latest_status_returned() {
        let contact = Contact::default();
        assert_eq!(contact.state().reason, "Starting");
        contact.made("192.0.2.1:9443");
        assert!(contact.state().connected);
        contact.lost("ControllerUnreachable", Absence::ControllerAway, "connection refused");
        let state = contact.state();
        assert_eq!((state.connected, state.reason), (false, "ControllerUnreachable"));
    }

    #[test]
    fn long_detail_cut_between_letters() {
        let contact = Contact::default();
        contact.lost("Refused", Absence::Unusable, &"ö".repeat(400));
        assert_eq!(contact.state().detail.len(), DETAIL_LIMIT);
    }
}
