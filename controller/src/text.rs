//! Text from other processes, made safe for logs, conditions and terminals.

/// Maximum length of a text, in characters.
const MAX_CHARS: usize = 512;

/// Returns the text truncated to [`MAX_CHARS`], with spaces for control characters, which could be terminal escape
/// sequences.
pub(crate) fn sanitized(text: &str) -> String {
    text.chars().take(MAX_CHARS).map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sanitized_removes_escape_sequences() {
        assert_eq!(sanitized("a\u{1b}]0;x\u{7}b\nc\u{9b}d"), "a ]0;x b c d");
    }

    #[test]
    fn sanitized_limits_characters_not_bytes() {
        assert_eq!(sanitized(&"\u{e4}".repeat(MAX_CHARS + 1)), "\u{e4}".repeat(MAX_CHARS));
    }
}
