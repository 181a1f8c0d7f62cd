//! The roles of pools that the kernel holds: one bit of a value, and a part of the names of maps and chains.

use std::ops::{Index, IndexMut};

use switchtower_proto::v1::Role;

/// The role bit of a value: Local.
pub(crate) const ROLE_BIT: u32 = 0x1000;

/// Role of a programmed pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum PoolRole {
    Cluster,
    Local,
}

impl PoolRole {
    pub(crate) const ALL: [Self; 2] = [Self::Cluster, Self::Local];

    /// Returns `None` for roles whose pools are never programmed.
    pub(crate) fn of(role: Role) -> Option<Self> {
        match role {
            Role::Cluster => Some(Self::Cluster),
            Role::Local => Some(Self::Local),
            Role::Unspecified | Role::Serving => None,
        }
    }

    /// The role in a value that leads to a pool.
    pub(crate) fn of_value(value: u32) -> Self {
        if value & ROLE_BIT == 0 { Self::Cluster } else { Self::Local }
    }

    /// The inverse of [`PoolRole::of_value`]: 0 or [`ROLE_BIT`].
    pub(crate) fn bit(self) -> u32 {
        match self {
            Self::Cluster => 0,
            Self::Local => ROLE_BIT,
        }
    }

    /// The role in the names of maps and chains.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::Local => "local",
        }
    }

    pub(crate) fn other(self) -> Self {
        match self {
            Self::Cluster => Self::Local,
            Self::Local => Self::Cluster,
        }
    }
}

/// One value per role.
#[derive(Debug, Clone, Default)]
pub(crate) struct ByRole<T> {
    cluster: T,
    local: T,
}

impl<T> ByRole<T> {
    pub(crate) fn iter(&self) -> impl Iterator<Item = (PoolRole, &T)> {
        PoolRole::ALL.into_iter().map(|role| (role, &self[role]))
    }
}

impl<T> Index<PoolRole> for ByRole<T> {
    type Output = T;

    fn index(&self, role: PoolRole) -> &T {
        match role {
            PoolRole::Cluster => &self.cluster,
            PoolRole::Local => &self.local,
        }
    }
}

impl<T> IndexMut<PoolRole> for ByRole<T> {
    fn index_mut(&mut self, role: PoolRole) -> &mut T {
        match role {
            PoolRole::Cluster => &mut self.cluster,
            PoolRole::Local => &mut self.local,
        }
    }
}
