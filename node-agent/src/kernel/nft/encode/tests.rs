//! Tests of the encoder.

use super::super::element::{Key, Range};
use super::*;

/// One element of every kind, added to an empty table.
fn filled<const N: usize>() -> Mirror<N> {
    let mut mirror = Mirror::<N>::new();
    let key = Key { address: [1; N], port: 80, protocol: 6 };
    let range = Range::new(&[0; N], 8).unwrap();
    let value = Data::Value(0x2411);
    let endpoint = Data::Endpoint([3; N], 8080);
    for (element, data) in [
        (Element::Frontend(key), value),
        (Element::Inside(key), value),
        (Element::Outside(key), value),
        (Element::Guarded(key), value),
        (Element::Slot { pool: 0x2000, index: 1 }, value),
        (Element::Backend(5), endpoint),
        (Element::StickyCluster(6), endpoint),
        (Element::StickyLocal(7), endpoint),
        (Element::StickyPool(8), value),
        (Element::SourceList(9), Data::Present),
        (Element::Source(9, range), Data::Present),
        (Element::Vip([1; N]), Data::Present),
        (Element::ClusterIp([1; N]), Data::Present),
        (Element::ServiceCidr(range), Data::Present),
        (Element::LocalPod(range), Data::Present),
        (Element::Refused(key), Data::Present),
        (Element::RefusedNodePort(key), Data::Present),
        (Element::Hairpin(key), Data::Present),
    ] {
        mirror.changes.put(element, None, Some(data));
    }
    mirror
}

const LENGTH: usize = 608288;
const HASH: &str = "d830da36458b30b58a7e6f57029221795445d4e50c66ea5732b501b600f5dfe8";

/// A change of these bytes is a change of the layout: raise `LAYOUT_VERSION` with it, unless only the encoding
/// differs and rule fingerprints stay the same.
#[test]
fn batch_bytes_fixed_per_layout_version() {
    let stamp = BTreeMap::from([(0, [7; 16])]);
    let mut batch = Batch::new();
    family(&mut batch, &filled::<4>(), &Structure::default(), &stamp, usize::MAX);
    family(&mut batch, &filled::<16>(), &Structure::default(), &stamp, usize::MAX);
    let hash = blake3::hash(batch.bytes()).to_hex();
    assert_eq!((batch.bytes().len(), hash.as_str()), (LENGTH, HASH));
}
