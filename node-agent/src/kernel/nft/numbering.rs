//! Numbers of service ports in the kernel.
//!
//! Service ports with affinity have multiples of 8: the upper bits of their members' ids are the number. All others
//! share one space of ids.

use super::element::Element;
use super::pool_role::PoolRole;

/// The kind of a service port's number, and of the ids of its backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Numbering {
    /// Without affinity: any id of the shared space, in map `backends`.
    Plain,
    /// With affinity: ids below the number, in one map per role.
    Sticky,
}

impl Numbering {
    /// The number from its index in the allocator of this kind.
    pub(crate) fn number(self, index: u32) -> u32 {
        match self {
            Self::Plain => index / 7 * 8 + index % 7 + 1,
            Self::Sticky => (index + 1) * 8,
        }
    }

    pub(crate) fn of(number: u32) -> Self {
        if number.is_multiple_of(8) { Self::Sticky } else { Self::Plain }
    }

    /// The element with the address of a backend.
    pub(crate) fn backend<const N: usize>(self, role: PoolRole, id: u32) -> Element<N> {
        match (self, role) {
            (Self::Plain, _) => Element::Backend(id),
            (Self::Sticky, PoolRole::Cluster) => Element::StickyCluster(id),
            (Self::Sticky, PoolRole::Local) => Element::StickyLocal(id),
        }
    }
}

/// The inverse of [`Numbering::number`].
pub(crate) fn index_of(number: u32) -> u32 {
    match Numbering::of(number) {
        Numbering::Sticky => (number / 8).saturating_sub(1),
        Numbering::Plain => number / 8 * 7 + number % 8 - 1,
    }
}

/// The upper bits of a value that leads to a pool: service port and role.
pub(crate) fn pool_bits(number: u32, role: PoolRole) -> u32 {
    number << 13 | role.bit()
}
