//! Removal of credentials and, on request, of IP addresses from collected text. Pure.

use std::collections::HashMap;
use std::net::IpAddr;

use serde_json::Value;

/// Replaces a removed value.
const REMOVED: &str = "[removed]";
/// Parts of names whose values are credentials.
const SENSITIVE: [&str; 7] = ["password", "passwd", "secret", "token", "credential", "apikey", "headers"];

/// Redacts the files of one bundle. Equal addresses get equal names in all files.
#[derive(Debug, Default)]
pub(super) struct Redactor {
    /// Names of the addresses; `None` keeps addresses.
    addresses: Option<HashMap<IpAddr, String>>,
}

impl Redactor {
    pub(super) fn new(addresses: bool) -> Self {
        Self { addresses: addresses.then(HashMap::new) }
    }

    /// Removes managed fields and the values of environment variables, annotations and fields that hold credentials.
    pub(super) fn object(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                if let Some(Value::Object(metadata)) = fields.get_mut("metadata") {
                    metadata.remove("managedFields");
                    if let Some(Value::Object(annotations)) = metadata.get_mut("annotations") {
                        // Repeats the whole object, with its credentials in one string.
                        annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
                    }
                }
                let variable = fields.get("name").and_then(Value::as_str).is_some_and(is_sensitive);
                for (name, field) in fields {
                    let holds = is_sensitive(name) || variable && name == "value";
                    if holds && field.is_string() { *field = REMOVED.into() } else { Self::object(field) }
                }
            }
            Value::Array(items) => items.iter_mut().for_each(Self::object),
            _ => {}
        }
    }

    /// Removes tokens and private keys and, if requested, replaces addresses.
    pub(super) fn text(&mut self, text: &str) -> String {
        let text = without_tokens(&without_keys(text));
        match &mut self.addresses {
            None => text,
            Some(names) => with_names(&text, names),
        }
    }
}

fn is_sensitive(name: &str) -> bool {
    let name = name.to_ascii_lowercase().replace(['-', '_'], "");
    SENSITIVE.iter().any(|part| name.contains(part))
}

/// Removes PEM blocks of private keys.
fn without_keys(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("-----BEGIN ") {
        let (before, block) = rest.split_at(start);
        let head = block["-----BEGIN ".len()..].find("-----").map(|end| &block[..end + "-----BEGIN ".len()]);
        out += before;
        if head.is_some_and(|head| head.contains("PRIVATE KEY")) {
            out += REMOVED;
            // An incomplete block extends to the end: half a key is a key.
            rest = match block.find("-----END ") {
                Some(end) => {
                    let tail = &block[end + "-----END ".len()..];
                    tail.find("-----").map_or("", |end| &tail[end + "-----".len()..])
                }
                None => "",
            };
        } else {
            out += "-----BEGIN ";
            rest = &block["-----BEGIN ".len()..];
        }
    }
    out + rest
}

/// Removes JSON Web Tokens and the values after `Bearer` and `Basic`.
fn without_tokens(text: &str) -> String {
    let in_token = |letter: char| letter.is_ascii_alphanumeric() || "-_.~+/".contains(letter);
    let mut out = String::with_capacity(text.len());
    let mut scheme = false;
    for word in text.split_inclusive(|letter: char| !in_token(letter)) {
        let body = word.trim_end_matches(|letter: char| !in_token(letter));
        let value = scheme && body.len() >= 8;
        match if value { Some(0) } else { web_token(body) } {
            Some(start) => {
                out += &body[..start];
                out += REMOVED;
                out += &word[body.len()..];
            }
            None => out += word,
        }
        if !body.is_empty() {
            scheme = ["bearer", "basic"].contains(&body.to_ascii_lowercase().as_str());
        }
    }
    out
}

/// Start of a JSON Web Token in a run of token characters: three parts, of which the first is an encoded object.
fn web_token(body: &str) -> Option<usize> {
    let starts = |at: usize| !body[..at].ends_with(|letter: char| letter.is_ascii_alphanumeric());
    let (start, _) = body.match_indices("eyJ").find(|(at, _)| starts(*at))?;
    (body[start..].matches('.').count() >= 2).then_some(start)
}

/// Replaces every address except loopback and unspecified ones by `ipv4-N` or `ipv6-N`.
fn with_names(text: &str, names: &mut HashMap<IpAddr, String>) -> String {
    let in_address = |letter: char| letter.is_ascii_hexdigit() || letter == '.' || letter == ':';
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut before = ' ';
    while !rest.is_empty() {
        let length = rest.find(|letter| !in_address(letter)).unwrap_or(rest.len());
        if length == 0 {
            let Some(letter) = rest.chars().next() else { break };
            out.push(letter);
            before = letter;
            rest = &rest[letter.len_utf8()..];
            continue;
        }
        let (word, after) = rest.split_at(length);
        // Part of a longer word, such as a name or a hash.
        let inside =
            before.is_alphanumeric() || after.starts_with(|letter: char| letter.is_ascii_alphabetic());
        match (!inside).then(|| address_in(word)).flatten() {
            Some((address, used)) => {
                out += &name(address, names);
                out += &word[used..];
            }
            None => out += word,
        }
        before = word.chars().next_back().unwrap_or(' ');
        rest = after;
    }
    out
}

/// Address at the start of a run of address characters, and its length. A port or punctuation may follow.
fn address_in(word: &str) -> Option<(IpAddr, usize)> {
    // An IPv4 address may be followed by a port and a colon; in an IPv6 address the first colon precedes a dot.
    let ipv4 = word.find('.').is_some_and(|dot| word.find(':').is_none_or(|colon| dot < colon));
    if !ipv4 && word.matches(':').count() > 1 {
        let used = word.trim_end_matches('.').len();
        let address = word[..used].parse().ok().map(|address| (address, used));
        return address.or_else(|| {
            let used = word.trim_end_matches(['.', ':']).len();
            Some((word[..used].parse().ok()?, used))
        });
    }
    let used = word.find(':').unwrap_or(word.len());
    let used = word[..used].trim_end_matches('.').len();
    Some((word[..used].parse().ok()?, used))
}

fn name(address: IpAddr, names: &mut HashMap<IpAddr, String>) -> String {
    if address.is_loopback() || address.is_unspecified() {
        return address.to_string();
    }
    let family = if address.is_ipv6() { "ipv6" } else { "ipv4" };
    let next = names.len() + 1;
    names.entry(address).or_insert_with(|| format!("{family}-{next}")).clone()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn credentials_are_removed_from_objects() {
        let mut pod = json!({
            "metadata": {
                "name": "c",
                "managedFields": [{}],
                "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "a": "b"},
            },
            "spec": {"containers": [{"env": [
                {"name": "OTEL_EXPORTER_OTLP_HEADERS", "value": "authorization=x"},
                {"name": "LEVEL", "value": "debug"},
                {"name": "DB_PASSWORD", "value": "hunter2"},
            ], "authToken": "abc"}]},
        });
        Redactor::object(&mut pod);
        let wanted = json!({
            "metadata": {"name": "c", "annotations": {"a": "b"}},
            "spec": {"containers": [{"env": [
                {"name": "OTEL_EXPORTER_OTLP_HEADERS", "value": REMOVED},
                {"name": "LEVEL", "value": "debug"},
                {"name": "DB_PASSWORD", "value": REMOVED},
            ], "authToken": REMOVED}]},
        });
        assert_eq!(pod, wanted);
    }

    #[test]
    fn tokens_and_private_keys_are_removed_from_text() {
        let mut redactor = Redactor::new(false);
        let cases = [
            ("token=eyJhbGciOi.eyJpc3Mi.c2ln!", "token=[removed]!"),
            ("/path/eyJhbGciOi.eyJpc3Mi.c2ln?x", "/path/[removed]?x"),
            ("abceyJa.b.c", "abceyJa.b.c"),
            ("Authorization: Bearer abcdefgh1234", "Authorization: Bearer [removed]"),
            ("a bearer of news", "a bearer of news"),
            ("x -----BEGIN EC PRIVATE KEY-----\nMHc\n-----END EC PRIVATE KEY----- y", "x [removed] y"),
            ("-----BEGIN PRIVATE KEY-----\nMHc", "[removed]"),
            ("-----BEGIN CERTIFICATE-----\nMII", "-----BEGIN CERTIFICATE-----\nMII"),
            ("10.0.0.1 is kept", "10.0.0.1 is kept"),
        ];
        for (text, wanted) in cases {
            assert_eq!(redactor.text(text), wanted);
        }
    }

    #[test]
    fn addresses_get_stable_names() {
        let mut redactor = Redactor::new(true);
        let cases = [
            ("10.0.0.1:80 -> 10.0.0.2", "ipv4-1:80 -> ipv4-2"),
            ("[2001:db8::1]:9443, 10.0.0.1.", "[ipv6-3]:9443, ipv4-1."),
            (
                "dial tcp 10.0.0.1:10250: refused; 10.0.0.2: gone",
                "dial tcp ipv4-1:10250: refused; ipv4-2: gone",
            ),
            ("2001:db8::1: refused", "ipv6-3: refused"),
            ("2001:db8::/32 and 10.0.0.0/8", "ipv6-4/32 and ipv4-5/8"),
            ("\"fd00::10.0.0.1\"", "\"ipv6-6\""),
            ("127.0.0.1 ::1 0.0.0.0 ::", "127.0.0.1 ::1 0.0.0.0 ::"),
            (
                "v1.2.3 12:30:45 sha256:ab12 dead::beef::1 1.2.3",
                "v1.2.3 12:30:45 sha256:ab12 dead::beef::1 1.2.3",
            ),
            ("node-10.0.0.1x 10.0.0.1", "node-10.0.0.1x ipv4-1"),
            ("ä10.0.0.1 für 10.0.0.1", "ä10.0.0.1 für ipv4-1"),
        ];
        for (text, wanted) in cases {
            assert_eq!(redactor.text(text), wanted);
        }
    }
}
