//! Terminal output: titles, commands and their output, in colour if the terminal supports it.
//!
//! All output is recorded, so that a run can be written as an SVG image.

use std::cell::RefCell;
use std::path::Path;

use anstyle::{AnsiColor, Style};
use anyhow::{Context as _, Result};

const WIDTH: usize = 100;
const TITLE: Style = AnsiColor::BrightCyan.on_default().bold();
const COMMAND: Style = Style::new().bold();
const GOOD: Style = AnsiColor::Green.on_default();
const BAD: Style = AnsiColor::BrightRed.on_default();

/// Highlighted table values and their styles.
const WORDS: [(&str, Style); 14] = [
    ("Synced", GOOD),
    ("UpToDate", GOOD),
    ("True", GOOD),
    ("Complete", GOOD),
    ("FORWARDED", GOOD),
    ("Failed", BAD),
    ("Stale", BAD),
    ("Progressing", BAD),
    ("Behind", BAD),
    ("False", BAD),
    ("Unknown", BAD),
    ("DROPPED", BAD),
    ("RollingBack", BAD),
    ("ProbeFailed", BAD),
];

/// Standard output with a recorded copy.
#[derive(Debug, Default)]
pub(super) struct Terminal {
    copy: RefCell<String>,
}

impl Terminal {
    /// Prints a line unchanged.
    pub(super) fn line(&self, text: &str) {
        anstream::println!("{text}");
        let mut copy = self.copy.borrow_mut();
        copy.push_str(text);
        copy.push('\n');
    }

    /// Prints the title of a scene.
    pub(super) fn title(&self, text: &str) {
        let rule = "─".repeat(WIDTH.saturating_sub(text.chars().count() + 4));
        self.line(&format!("\n{TITLE}── {text} {rule}{TITLE:#}"));
    }

    /// Prints a command as a user would type it.
    pub(super) fn command(&self, command: &str) {
        self.line(&format!("\n  {COMMAND}$ {command}{COMMAND:#}"));
    }

    /// Prints a command's output, indented and highlighted.
    pub(super) fn output(&self, text: &str) {
        for line in text.trim_end().lines() {
            self.line(format!("  {}", coloured(line)).trim_end());
        }
    }

    /// Prints a verified statement.
    pub(super) fn checked(&self, text: &str) {
        self.line(&format!("  {GOOD}✓{GOOD:#} {text}"));
    }

    pub(super) fn failure(&self, text: &str) {
        self.line(&format!("\n{BAD}{text}{BAD:#}"));
    }

    /// Writes all recorded output as an SVG image.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn write_svg(&self, path: &Path) -> Result<()> {
        let image = anstyle_svg::Term::new().min_width_px(880).render_svg(&self.copy.borrow());
        std::fs::write(path, image).with_context(|| format!("writing {}", path.display()))
    }
}

fn coloured(line: &str) -> String {
    let mut result = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(start) = rest.find(|character: char| character.is_ascii_alphabetic()) {
        let (before, tail) = rest.split_at(start);
        let end = tail.find(|character: char| !character.is_ascii_alphanumeric()).unwrap_or(tail.len());
        let (word, after) = tail.split_at(end);
        result.push_str(before);
        match WORDS.iter().find(|(known, _)| *known == word) {
            Some((_, style)) => result.push_str(&format!("{style}{word}{style:#}")),
            None => result.push_str(word),
        }
        rest = after;
    }
    result + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_words_are_coloured() {
        assert_eq!(coloured("gamma  Stale  3"), format!("gamma  {BAD}Stale{BAD:#}  3"));
        assert_eq!(coloured("NotStale Falsehood"), "NotStale Falsehood");
    }
}
