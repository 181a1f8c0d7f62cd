//! State of an address in the drain gate, for `kubectl switchtower wait --endpoint`.

use std::net::IpAddr;
use std::time::Duration;

use switchtower_admin_api::DrainReport;
use switchtower_core::drain::{Names, Verdict};

use crate::fleet::Fleet;

/// Maximum time that a request waits: requests are few at a time, and the client repeats them.
const WAIT: Duration = Duration::from_millis(500);

pub(super) async fn drain(fleet: &Fleet, address: IpAddr) -> DrainReport {
    let drained = fleet.drain(None, address.to_canonical(), WAIT).await;
    let names = |names: &Names| names.names.iter().map(ToString::to_string).collect();
    let (waited_for, missing) = (&drained.answer.waited_for, &drained.answer.missing);
    DrainReport {
        verdict: drained.verdict().to_owned(),
        endpoint: drained.answer.verdict == Verdict::StillMember,
        waited_for: names(waited_for),
        waited_for_total: waited_for.total,
        missing: names(missing),
        missing_total: missing.total,
    }
}
