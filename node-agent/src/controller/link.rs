//! Whether a controller is connected, and if not, why: the agent's own word for who asks from outside.
//!
//! A node whose agent finds no controller cannot report that through the controller. It says it on its health
//! port at `/connection`, where the controller asks agents that do not come, and a person can. Health and
//! liveness do not depend on it: the data plane works without a controller.

use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

/// Most bytes of a detail.
const DETAIL_LIMIT: usize = 512;

/// Why there is no stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absence {
    /// No attempt has ended yet.
    Unknown,
    /// The controller is away; a later attempt may find it.
    ControllerAway,
    /// What the agent was given does not lead to a controller that accepts it: files, credentials or its version.
    Unusable,
}

/// The answer at `/connection`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ContactState {
    /// A controller's stream is open.
    pub connected: bool,
    /// One CamelCase word: why not. Empty while connected.
    pub reason: &'static str,
    /// For people, at most 512 bytes: the controller's address while connected, what failed otherwise.
    pub detail: String,
    /// Why there is no stream; `None` while there is one.
    #[serde(skip)]
    pub absence: Option<Absence>,
}

impl ContactState {
    /// There is a controller, or only its absence keeps the agent from one.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        matches!(self.absence, None | Some(Absence::ControllerAway))
    }
}

/// The last word, shared by the session that knows and the server that tells.
#[derive(Debug, Clone)]
pub struct Contact(Arc<Mutex<ContactState>>);

impl Default for Contact {
    fn default() -> Self {
        let detail = "no attempt to connect has ended yet".to_owned();
        Self(Arc::new(Mutex::new(ContactState {
            connected: false,
            reason: "Starting",
            detail,
            absence: Some(Absence::Unknown),
        })))
    }
}

impl Contact {
    /// A stream to the controller at `address` is open.
    pub fn made(&self, address: &str) {
        self.set(ContactState { connected: true, reason: "", detail: shortened(address), absence: None });
    }

    /// There is no stream, for this reason.
    pub fn lost(&self, reason: &'static str, absence: Absence, detail: &str) {
        let (detail, absence) = (shortened(detail), Some(absence));
        self.set(ContactState { connected: false, reason, detail, absence });
    }

    /// What is known now.
    #[must_use]
    pub fn state(&self) -> ContactState {
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
    fn the_last_word_counts() {
        let contact = Contact::default();
        assert_eq!(contact.state().reason, "Starting");
        contact.made("192.0.2.1:9443");
        assert!(contact.state().connected);
        contact.lost("ControllerUnreachable", Absence::ControllerAway, "connection refused");
        let state = contact.state();
        assert_eq!((state.connected, state.reason), (false, "ControllerUnreachable"));
    }

    #[test]
    fn a_long_detail_is_cut_between_letters() {
        let contact = Contact::default();
        contact.lost("Refused", Absence::Unusable, &"ö".repeat(400));
        assert_eq!(contact.state().detail.len(), DETAIL_LIMIT);
    }
}
