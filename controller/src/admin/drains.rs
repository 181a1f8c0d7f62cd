//! State of an address in the drain gate, for `kubectl switchtower wait --endpoint`.

use std::net::IpAddr;
use std::time::Duration;

use switchtower_admin_api::DrainReport;
use switchtower_core::compiled::PodIdentity;
use switchtower_core::drain::Verdict;

use crate::fleet::Fleet;

/// Maximum time that a request waits: requests are few at a time, and the client repeats them.
const WAIT: Duration = Duration::from_millis(500);

pub(super) async fn drain(fleet: &Fleet, address: IpAddr) -> DrainReport {
    let drained = fleet.drain_everywhere(None, &PodIdentity::Address(address.to_canonical()), WAIT).await;
    let (waited_for, missing) = (&drained.answer.waited_for, &drained.answer.missing);
    DrainReport {
        verdict: drained.verdict_name().to_owned(),
        endpoint: drained.answer.verdict == Verdict::StillMember,
        waited_for: waited_for.to_strings(),
        waited_for_total: waited_for.total,
        missing: missing.to_strings(),
        missing_total: missing.total,
    }
}
