//! The page: HTML, style and script in one document without external resources.

use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

const HTML: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Random text of 32 hexadecimal digits.
pub(super) fn nonce() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// Content-Security-Policy of the page: only its own inline style and script, and requests to its own origin.
pub(super) fn policy(nonce: &str) -> String {
    format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
}

/// Returns the document. With `state` it shows this state and requests nothing.
pub(super) fn document(nonce: &str, state: Option<&impl Serialize>, time: Timestamp) -> String {
    let state = state.map_or_else(
        || "null".to_owned(),
        |state| {
            // In HTML only the end of the element, or a comment, ends the text.
            serde_json::to_string(state).unwrap_or_else(|_| "null".to_owned()).replace('<', "\\u003c")
        },
    );
    let seconds = time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    // The state last: it may contain the other placeholders.
    HTML.replace("{{NONCE}}", nonce)
        .replace("{{TIME}}", &seconds)
        .replace("{{STYLE}}", STYLE)
        .replace("{{SCRIPT}}", SCRIPT)
        .replacen("{{STATE}}", &state, 1)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn document_has_no_external_resources() {
        let html = document("abc", None::<&()>, Timestamp::UNIX_EPOCH);
        for text in ["http://", "https://", "src=", "@import", "url(", "{{", "innerHTML", "eval("] {
            assert!(!html.contains(text), "{text}");
        }
        assert_eq!(html.matches("nonce=\"abc\"").count(), 2);
        assert!(html.contains("<html lang=\"en\">") && html.contains("prefers-color-scheme: dark"));
        assert!(html.len() < 40_000, "{} bytes", html.len());
    }

    #[test]
    fn embedded_state_cannot_end_its_element() {
        let state = json!({"message": "</script><script>alert(1)</script> {{STATE}}"});
        let html = document("abc", Some(&state), Timestamp::UNIX_EPOCH);
        assert!(!html.contains("</script><script>alert"), "{html}");
        let (_, rest) = html.split_once("<script type=\"application/json\" id=\"state\">").unwrap();
        let (text, _) = rest.split_once("</script>").unwrap();
        assert_eq!(serde_json::from_str::<serde_json::Value>(text).unwrap(), state);
    }
}
