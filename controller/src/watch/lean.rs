//! Objects without `metadata.managedFields`. The API server sends the owners of all fields with every object; decoding
//! them costs more time and memory than the rest of a small object, and nothing here reads them.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

/// An object that is decoded without `metadata.managedFields`.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct Lean<K>(pub K);

impl<'de, K: DeserializeOwned> Deserialize<'de> for Lean<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Box::<RawValue>::deserialize(deserializer)?;
        decode(text.get()).map(Self).map_err(D::Error::custom)
    }
}

/// Decodes the text of an object, except for `metadata.managedFields`.
///
/// # Errors
/// Those of the decoder.
pub(super) fn decode<K: DeserializeOwned>(text: &str) -> serde_json::Result<K> {
    serde_json::from_str(&without_managed_fields(text))
}

#[derive(Deserialize)]
struct Outline<'a> {
    #[serde(borrow, default)]
    metadata: Option<OutlineOfMetadata<'a>>,
}

#[derive(Deserialize)]
struct OutlineOfMetadata<'a> {
    #[serde(borrow, default, rename = "managedFields")]
    managed_fields: Option<&'a RawValue>,
}

fn without_managed_fields(text: &str) -> Cow<'_, str> {
    // The decoder of the object reports a text that is malformed.
    let outline = serde_json::from_str::<Outline<'_>>(text).ok();
    let fields = outline.and_then(|outline| outline.metadata?.managed_fields);
    let Some(fields) = fields.map(RawValue::get) else { return Cow::Borrowed(text) };
    let start = fields.as_ptr().addr() - text.as_ptr().addr();
    Cow::Owned([&text[..start], "null", &text[start + fields.len()..]].concat())
}

/// The kind of a wrapper of an object: that of the object.
macro_rules! kind_of {
    ($object:ident) => {
        type DynamicType = $object::DynamicType;
        type Scope = $object::Scope;

        fn kind(dynamic: &Self::DynamicType) -> std::borrow::Cow<'_, str> {
            $object::kind(dynamic)
        }

        fn group(dynamic: &Self::DynamicType) -> std::borrow::Cow<'_, str> {
            $object::group(dynamic)
        }

        fn version(dynamic: &Self::DynamicType) -> std::borrow::Cow<'_, str> {
            $object::version(dynamic)
        }

        fn plural(dynamic: &Self::DynamicType) -> std::borrow::Cow<'_, str> {
            $object::plural(dynamic)
        }
    };
}
pub(super) use kind_of;

impl<K: Resource> Resource for Lean<K> {
    kind_of!(K);

    fn meta(&self) -> &ObjectMeta {
        self.0.meta()
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.0.meta_mut()
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Service;
    use serde_json::json;

    use super::*;

    #[test]
    fn managed_fields_are_left_out_and_all_else_is_kept() {
        let object = |managed: serde_json::Value| {
            json!({
                "apiVersion": "v1", "kind": "Service",
                "metadata": {"name": "s", "labels": {"managedFields": "x"}, "managedFields": managed, "uid": "1"},
                "spec": {"ports": [{"port": 80}], "selector": {"managedFields": "]}"}},
            })
        };
        let managed = json!([{"manager": "m", "fieldsV1": {"f:metadata": {"f:\"]}": {}}}}]);
        let decoded: Lean<Service> = serde_json::from_str(&object(managed).to_string()).unwrap();
        let expected: Service = serde_json::from_value(object(json!(null))).unwrap();
        assert_eq!(decoded.0, expected);
        assert_eq!(decoded.0.metadata.managed_fields, None);
    }

    #[test]
    fn malformed_objects_are_reported_by_their_decoder() {
        for text in ["{", "[]", r#"{"metadata": 1}"#, r#"{"metadata": {"managedFields": [}}"#] {
            assert!(serde_json::from_str::<Lean<Service>>(text).is_err(), "{text}");
        }
        let without: Lean<Service> =
            serde_json::from_str(r#"{"kind": "Service", "apiVersion": "v1", "metadata": {}}"#).unwrap();
        assert_eq!(without.0, Service::default());
    }
}
