//! The name of a service port.

use std::fmt;

use switchtower_proto::v1::ServicePort;

/// Identifies a service port, in one allocation instead of three: a mirror holds one per service port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct PortName {
    /// Namespace, name and port, without separators.
    text: Box<str>,
    /// Lengths of namespace and name in bytes.
    lengths: (usize, usize),
    protocol: i32,
}

impl PortName {
    fn namespace(&self) -> &str {
        &self.text[..self.lengths.0]
    }

    fn name(&self) -> &str {
        &self.text[self.lengths.0..][..self.lengths.1]
    }

    fn port(&self) -> &str {
        &self.text[self.lengths.0 + self.lengths.1..]
    }

    /// Returns `namespace/name` of the Service.
    pub(crate) fn service(&self) -> String {
        format!("{}/{}", self.namespace(), self.name())
    }
}

impl From<&ServicePort> for PortName {
    fn from(port: &ServicePort) -> Self {
        PortName {
            text: [port.namespace.as_str(), &port.name, &port.port].concat().into(),
            lengths: (port.namespace.len(), port.name.len()),
            protocol: port.protocol,
        }
    }
}

impl From<&PortName> for ServicePort {
    fn from(name: &PortName) -> Self {
        ServicePort {
            namespace: name.namespace().to_owned(),
            name: name.name().to_owned(),
            port: name.port().to_owned(),
            protocol: name.protocol,
        }
    }
}

/// Formats `namespace/name:port`, or `namespace/name` for an unnamed port.
impl fmt::Display for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (namespace, name, port) = (self.namespace(), self.name(), self.port());
        let separator = if port.is_empty() { "" } else { ":" };
        write!(f, "{namespace}/{name}{separator}{port}")
    }
}

#[cfg(test)]
mod tests {
    use switchtower_proto::v1::Protocol;

    use super::*;

    fn port(namespace: &str, name: &str, port: &str) -> ServicePort {
        let protocol = Protocol::Tcp.into();
        ServicePort { namespace: namespace.into(), name: name.into(), port: port.into(), protocol }
    }

    #[test]
    fn parts_restored() {
        for original in [port("default", "web", "http"), port("default", "web", ""), ServicePort::default()] {
            assert_eq!(ServicePort::from(&PortName::from(&original)), original);
        }
        assert_eq!(PortName::from(&port("default", "web", "http")).to_string(), "default/web:http");
        assert_eq!(PortName::from(&port("default", "web", "")).to_string(), "default/web");
    }

    #[test]
    fn names_with_equal_text_differ() {
        let names = [port("a", "bc", ""), port("ab", "c", ""), port("a", "b", "c"), port("", "abc", "")];
        for (index, name) in names.iter().enumerate() {
            for other in &names[index + 1..] {
                assert_ne!(PortName::from(name), PortName::from(other));
            }
        }
        let udp = ServicePort { protocol: Protocol::Udp.into(), ..names[0].clone() };
        assert_ne!(PortName::from(&names[0]), PortName::from(&udp));
    }
}
