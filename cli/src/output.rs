//! Output of results: a value for programs, or a text of at most 100 columns.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use crate::args::{Color, Format};
use crate::error::CliError;

/// Maximum line length of texts, in columns.
pub(crate) const WIDTH: usize = 100;

/// SGR parameters of our colours: good, warn, bad and reset.
const PAINTS: [&str; 4] = ["32", "33", "31;1", "0"];

/// Exit code of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// No problem was found.
    Ok = 0,
    /// A problem was found and reported.
    Wrong = 1,
    /// The command could not be completed.
    Unknown = 2,
}

/// Result of a command.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) text: String,
    pub(crate) value: Value,
    pub(crate) exit: Exit,
}

impl Report {
    pub(crate) fn new(text: String, value: &impl Serialize, exit: Exit) -> Result<Self, CliError> {
        let value = serde_json::to_value(value)
            .map_err(|error| CliError::new(format!("serialise the result as JSON: {error}")))?;
        Ok(Self { text, value, exit })
    }

    /// Creates a report that has no structured value.
    pub(crate) fn text(text: String) -> Self {
        Self { value: Value::String(text.clone()), text, exit: Exit::Ok }
    }
}

/// Prints a report to standard output.
pub(crate) fn print(report: &Report, format: Format) {
    let text = match format {
        Format::Text => printable(&report.text),
        Format::Json => format!("{:#}\n", report.value),
        // JSON is valid YAML: a safe fallback if the writer fails.
        Format::Yaml => {
            serde_saphyr::to_string(&report.value).unwrap_or_else(|_| format!("{:#}\n", report.value))
        }
    };
    // A closed pipe, as with `| head`, is not an error.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}

/// Prints an error to standard error.
pub(crate) fn print_error(error: &CliError, style: Style) {
    let mut text = format!("{} {}\n", style.bad("error:"), error.message);
    if let Some(code) = error.code {
        text += &format!("  {} {}\n", code.code, wrapped(code.action, 9));
    }
    let _ = std::io::stderr().lock().write_all(printable(&text).as_bytes());
}

/// Prints a line to standard output before the result, for a command that keeps running.
pub(crate) fn announce(line: &str) {
    let mut out = std::io::stdout().lock();
    // A closed pipe is not an error.
    let _ = writeln!(out, "{}", printable(line)).and_then(|()| out.flush());
}

/// Creates a file that only the user can read. Never replaces a file; `flag` names the remedy.
pub(crate) fn create_file(path: &Path, flag: &str) -> Result<File, CliError> {
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    opened.map_err(|error| {
        CliError::new(format!("cannot create {}: {error}; choose another file with {flag}", path.display()))
    })
}

/// Replaces control characters other than our own colours, because text from nodes and objects is not trusted.
fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(letter) = rest.chars().next() {
        let color = PAINTS.iter().find_map(|code| {
            let ours = rest.strip_prefix("\u{1b}[")?.strip_prefix(code)?.starts_with('m');
            ours.then_some(code.len() + 3)
        });
        let length = color.unwrap_or(letter.len_utf8());
        if color.is_none() && letter.is_control() && letter != '\n' {
            out.push(' ');
        } else {
            out.push_str(&rest[..length]);
        }
        rest = &rest[length..];
    }
    out
}

/// Colouring of the output.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Style {
    colored: bool,
}

impl Style {
    /// Without colours.
    pub(crate) const PLAIN: Self = Self { colored: false };

    pub(crate) fn detect(color: Color) -> Self {
        let colored = match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => {
                let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
                !refused && std::io::stdout().is_terminal()
            }
        };
        Self { colored }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colored { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }

    pub(crate) fn good(self, text: &str) -> String {
        self.paint("32", text)
    }

    pub(crate) fn warn(self, text: &str) -> String {
        self.paint("33", text)
    }

    pub(crate) fn bad(self, text: &str) -> String {
        self.paint("31;1", text)
    }
}

/// Formats a table with aligned columns and wraps the last one. Every row must have as many cells as the header.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let last = header.len() - 1;
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([header[column].len()]).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..last).map(width).collect();
    let indent: usize = widths.iter().map(|width| width + 2).sum();
    let line = |cells: Vec<&str>| {
        let mut line = String::new();
        for (cell, width) in cells.iter().zip(&widths) {
            line += &format!("{cell:width$}  ");
        }
        line += &wrapped(cells[last], indent);
        line.trim_end().to_owned() + "\n"
    };
    let mut text = line(header.to_vec());
    for row in rows {
        text += &line(row.iter().map(String::as_str).collect());
    }
    text
}

/// Wraps a text to [`WIDTH`] at word boundaries. The first line starts at column `indent`, like the others.
pub(crate) fn wrapped(text: &str, indent: usize) -> String {
    let room = WIDTH.saturating_sub(indent).max(30);
    let (mut out, mut length) = (String::new(), 0);
    for word in text.split_whitespace() {
        let width = word.chars().count();
        if length > 0 && length + 1 + width > room {
            out += &format!("\n{:indent$}", "");
            length = 0;
        } else if length > 0 {
            out.push(' ');
            length += 1;
        }
        out += word;
        length += width;
    }
    out
}

/// Formats a duration as `12s`, `6m12s`, `3h5m` or `9d`.
pub(crate) fn age(seconds: i64) -> String {
    let seconds = seconds.max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..3_600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{}h{}m", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Formats a number with a noun: `1 node`, `3 nodes`.
pub(crate) fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

/// Lists the first `most` names and the number of further ones.
pub(crate) fn names<T: AsRef<str>>(names: &[T], total: usize, most: usize) -> String {
    let shown: Vec<&str> = names.iter().take(most).map(AsRef::as_ref).collect();
    let more = total.saturating_sub(shown.len());
    let text = shown.join(", ");
    if more == 0 { text } else { format!("{text} and {more} more") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_colors_reach_the_terminal() {
        let style = Style { colored: true };
        let text = format!("{}\n\u{1b}[2J{}\u{9b}2J\u{1b}", style.bad("gone"), style.good("a\u{7}b"));
        let shown = "\u{1b}[31;1mgone\u{1b}[0m\n [2J\u{1b}[32ma b\u{1b}[0m 2J ";
        assert_eq!(printable(&text), shown);
    }

    #[test]
    fn existing_files_are_kept() {
        let path = std::env::current_exe().unwrap();
        let error = create_file(&path, "--file").unwrap_err();
        assert!(error.message.ends_with("choose another file with --file"), "{error}");
    }

    #[test]
    fn tables_are_aligned_and_wrapped() {
        let long = "word ".repeat(30);
        let rows = vec![vec!["a".to_owned(), long], vec!["longer".to_owned(), "b".to_owned()]];
        let text = table(&["NAME", "WHY"], &rows);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "NAME    WHY");
        assert!(lines[1].starts_with("a       word"));
        assert!(lines[2].starts_with("        word"));
        assert_eq!(lines.last(), Some(&"longer  b"));
        assert!(lines.iter().all(|line| line.chars().count() <= WIDTH), "{text}");
    }

    #[test]
    fn ages_and_lists_are_formatted() {
        let ages: Vec<String> = [-5, 59, 372, 11_100, 800_000].into_iter().map(age).collect();
        assert_eq!(ages, ["0s", "59s", "6m12s", "3h5m", "9d"]);
        assert_eq!(names(&["a", "b", "c"], 7, 2), "a, b and 5 more");
        assert_eq!(names(&["a"], 1, 2), "a");
        assert_eq!((count(1, "node"), count(0, "node")), ("1 node".to_owned(), "0 nodes".to_owned()));
    }
}
