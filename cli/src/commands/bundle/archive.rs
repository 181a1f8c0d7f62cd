//! A gzipped tar of bounded size.

use std::io::{self, Write};

use flate2::Compression;
use flate2::write::GzEncoder;

/// Maximum size of one file, so that one long log does not displace the others. In bytes.
const FILE_BYTES: usize = 4 << 20;

/// An archive with a limit for the total size of its files, before compression.
pub(super) struct Archive<W: Write> {
    tar: tar::Builder<GzEncoder<W>>,
    folder: String,
    remaining: usize,
    modified: u64,
    incomplete: Vec<String>,
}

impl<W: Write> Archive<W> {
    /// Creates an archive whose files are in `folder` and have the time `modified`, in seconds since 1970.
    pub(super) fn new(out: W, folder: &str, maximum_bytes: usize, modified: u64) -> Self {
        Self {
            tar: tar::Builder::new(GzEncoder::new(out, Compression::default())),
            folder: folder.to_owned(),
            remaining: maximum_bytes,
            modified,
            incomplete: Vec::new(),
        }
    }

    /// Adds a file. Beyond the limits it is shortened to its end, which is the latest part of a log, or left out;
    /// [`Archive::finish`] returns both.
    ///
    /// # Errors
    /// The archive cannot be written.
    pub(super) fn add(&mut self, name: &str, text: &str) -> io::Result<()> {
        let room = self.remaining.min(FILE_BYTES);
        let mut start = text.len().saturating_sub(room);
        while !text.is_char_boundary(start) {
            start += 1;
        }
        if start > 0 {
            let kept = text.len() - start;
            self.incomplete.push(format!("{name}: the last {kept} of {} bytes", text.len()));
            if kept == 0 {
                return Ok(());
            }
        }
        self.remaining -= text.len() - start;
        self.append(name, &text.as_bytes()[start..])
    }

    fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.modified);
        self.tar.append_data(&mut header, format!("{}/{name}", self.folder), bytes)
    }

    /// Writes a list of incomplete files and the end of the archive, and returns the list.
    ///
    /// # Errors
    /// The archive cannot be written.
    pub(super) fn finish(mut self) -> io::Result<Vec<String>> {
        if !self.incomplete.is_empty() {
            // Outside the limit: it is short.
            let list = self.incomplete.join("\n") + "\n";
            self.append("incomplete.txt", list.as_bytes())?;
        }
        self.tar.into_inner()?.finish()?.flush()?;
        Ok(self.incomplete)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn files(bytes: &[u8]) -> Vec<(String, String)> {
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(bytes));
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            (entry.path().unwrap().to_str().unwrap().to_owned(), text)
        });
        entries.collect()
    }

    #[test]
    fn total_size_is_bounded() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes, "b", 10, 7);
        archive.add("first.txt", "12345").unwrap();
        // The limit is inside the letter: the whole letter is left out.
        archive.add("second.txt", "old ä1234").unwrap();
        archive.add("third.txt", "gone").unwrap();
        let incomplete = archive.finish().unwrap();
        let list = ["second.txt: the last 4 of 10 bytes", "third.txt: the last 1 of 4 bytes"];
        assert_eq!(incomplete, list);
        let wanted = [
            ("b/first.txt", "12345"),
            ("b/second.txt", "1234"),
            ("b/third.txt", "e"),
            ("b/incomplete.txt", &format!("{}\n{}\n", list[0], list[1])),
        ];
        assert_eq!(files(&bytes), wanted.map(|(name, text)| (name.to_owned(), text.to_owned())));
    }

    #[test]
    fn files_without_room_are_left_out() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes, "b", 1, 7);
        archive.add("a", "1").unwrap();
        archive.add("b", "2").unwrap();
        assert_eq!(archive.finish().unwrap(), ["b: the last 0 of 1 bytes"]);
        assert_eq!(files(&bytes).len(), 2);
    }
}
