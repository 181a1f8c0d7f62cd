//! An object that may fail to decode without failing the list or the event that it is part of.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::lean;

/// An object, or its metadata and a decoding error.
///
/// kube's `DeserializeGuard` does the same through a generic value, which costs several times the memory and time of
/// the object. Here the text is decoded once, and a second time only after a failure.
#[derive(Debug, Clone)]
pub enum Tolerant<K> {
    /// The object.
    Whole(Box<K>),
    /// The object could not be decoded.
    Broken {
        /// Metadata; empty if these could not be decoded either.
        metadata: Box<ObjectMeta>,
        /// The decoder's message.
        error: String,
    },
}

impl<K: Resource> Tolerant<K> {
    /// The object's metadata.
    pub fn metadata(&self) -> &ObjectMeta {
        match self {
            Self::Whole(object) => object.meta(),
            Self::Broken { metadata, .. } => metadata,
        }
    }
}

#[derive(Deserialize)]
struct MetadataOnly {
    #[serde(default)]
    metadata: ObjectMeta,
}

impl<'de, K: DeserializeOwned> Deserialize<'de> for Tolerant<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Box::<RawValue>::deserialize(deserializer)?;
        Ok(match lean::decode::<K>(text.get()) {
            Ok(object) => Self::Whole(Box::new(object)),
            Err(error) => {
                let readable = serde_json::from_str::<MetadataOnly>(text.get());
                let metadata = readable.map(|object| object.metadata).unwrap_or_default();
                Self::Broken { metadata: Box::new(metadata), error: error.to_string() }
            }
        })
    }
}

impl<K: Resource> Resource for Tolerant<K> {
    lean::kind_of!(K);

    fn meta(&self) -> &ObjectMeta {
        self.metadata()
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        match self {
            Self::Whole(object) => object.meta_mut(),
            Self::Broken { metadata, .. } => metadata,
        }
    }
}
