//! Elections with scripted Leases.

use super::*;

const DURATION: Duration = Duration::from_secs(10);

fn lease(holder: &str, renewed: i64) -> Lease {
    Lease {
        metadata: ObjectMeta { uid: Some("uid".to_owned()), ..ObjectMeta::default() },
        spec: Some(LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: Some(10),
            renew_time: Some(MicroTime(Timestamp::from_second(renewed).unwrap())),
            ..LeaseSpec::default()
        }),
    }
}

#[tokio::test(start_paused = true)]
async fn free_lease_is_taken_at_once() {
    let now = Instant::now();
    assert_eq!(Election::new("a").follower(None, now), Step::Take);
    assert_eq!(Election::new("a").follower(Some(&lease("", 0)), now), Step::Take);
    assert_eq!(Election::new("a").follower(Some(&Lease::default()), now), Step::Take, "garbage");
}

#[tokio::test(start_paused = true)]
async fn expiry_counts_from_observed_renewals_only() {
    let start = Instant::now();
    let mut election = Election::new("a");
    let wait = Step::Wait("b".to_owned());
    // The holder's clock is in the past or the future by any amount.
    for (second, renewed) in [(0, 5), (9, 4_000_000_000), (18, 6)] {
        let now = start + Duration::from_secs(second);
        assert_eq!(election.follower(Some(&lease("b", renewed)), now), wait, "{second}");
    }
    let last = start + Duration::from_secs(18);
    let almost = last + DURATION - Duration::from_millis(1);
    assert_eq!(election.follower(Some(&lease("b", 6)), almost), wait);
    assert_eq!(election.follower(Some(&lease("b", 6)), last + DURATION), Step::Take);
}

#[tokio::test(start_paused = true)]
async fn deleted_lease_left_to_its_holder_first() {
    let now = Instant::now();
    let mut election = Election::new("a");
    election.follower(Some(&lease("b", 1)), now);
    assert_eq!(election.follower(None, now + DURATION / 2), Step::Wait("b".to_owned()));
    assert_eq!(election.follower(None, now + DURATION), Step::Take);
    assert_eq!(Election::new("b").holder(None), Step::Take);
}

#[tokio::test(start_paused = true)]
async fn holder_loses_the_lease_to_any_other_name() {
    let election = Election::new("a");
    assert_eq!(election.holder(Some(&lease("a", 1))), Step::Take);
    assert_eq!(election.holder(Some(&lease("b", 1))), Step::Wait("b".to_owned()));
    // Another replica took it and has released it since.
    assert_eq!(election.holder(Some(&lease("", 1))), Step::Wait("no replica".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn stored_durations_are_clamped() {
    let now = Instant::now();
    for (stored, expected) in [(i32::MAX, 60), (-5, 1), (0, 1)] {
        let mut held = lease("b", 1);
        if let Some(spec) = &mut held.spec {
            spec.lease_duration_seconds = Some(stored);
        }
        let mut election = Election::new("a");
        election.follower(Some(&held), now);
        let almost = now + Duration::from_secs(expected) - Duration::from_millis(1);
        assert_ne!(election.follower(Some(&held), almost), Step::Take, "{stored}");
        assert_eq!(
            election.follower(Some(&held), now + Duration::from_secs(expected)),
            Step::Take,
            "{stored}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn fence_closes_before_another_takeover() {
    let fence = Fence::default();
    assert!(!fence.is_open());
    fence.open_until(Instant::now() + DURATION.mul_f64(0.8));
    assert!(fence.is_open());
    tokio::time::advance(DURATION.mul_f64(0.8)).await;
    assert!(!fence.is_open(), "not renewed");
    fence.open_until(Instant::now() + DURATION);
    assert!(fence.is_open(), "renewed again");
    fence.close();
    assert!(!fence.is_open(), "lost");
    fence.open_until(Instant::now() + DURATION);
    assert!(fence.is_open(), "acquired again");
    fence.close_for_good();
    fence.open_until(Instant::now() + DURATION);
    assert!(!fence.is_open(), "a renewal that arrives after the release");
}
