//! Runs programs to completion, with errors that name the program and quote the end of its output.

use std::ffi::OsStr;
use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Prints a line of progress to standard error.
pub fn say(line: &str) {
    // A closed stream is no reason to stop.
    let _ = writeln!(std::io::stderr(), "==> {line}");
}

/// Prints a line of results to standard output.
pub fn print(line: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{line}").context("writing to the standard output")
}

/// Runs a program and returns its output; an error quotes the end of its standard error.
pub fn run<I, S>(program: &str, arguments: I) -> Result<String>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut command = Command::new(program);
    command.args(arguments);
    finish(&mut command)
}

/// Splits a line at blanks and runs it.
pub fn run_line(line: &str) -> Result<String> {
    let mut words = line.split_whitespace();
    let program = words.next().context("an empty command line")?;
    run(program, words)
}

/// Runs a prepared command to completion.
pub fn finish(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{} could not be started", describe(command)))?;
    checked(command, &output)
}

/// Runs a prepared command with this text as its input.
pub fn finish_with_input(command: &mut Command, input: &str) -> Result<String> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{} could not be started", describe(command)))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).with_context(|| format!("writing to {}", describe(command)))?;
    }
    let output = child.wait_with_output().with_context(|| format!("waiting for {}", describe(command)))?;
    checked(command, &output)
}

fn checked(command: &Command, output: &Output) -> Result<String> {
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        let last: Vec<&str> = words.lines().rev().take(5).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        bail!("{} failed ({}): {}", describe(command), output.status, last.join(" | "));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn describe(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args().take(12) {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    format!("`{text}`")
}

/// Calls `work` for all items in parallel, each on its own thread; returns the first error after all have ended.
pub fn on_each<T: Sync>(all: &[T], work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    let work = &work;
    std::thread::scope(|scope| {
        let running: Vec<_> = all.iter().map(|one| scope.spawn(move || work(one))).collect();
        let mut results = Vec::new();
        for thread in running {
            results.push(thread.join().unwrap_or_else(|_| bail!("a thread panicked")));
        }
        results.into_iter().collect()
    })
}

/// Results of tests, printed as they arrive.
#[derive(Debug, Default)]
pub struct Results {
    passed: u32,
    failed: u32,
}

impl Results {
    /// Runs a test and prints its result.
    pub fn add(&mut self, name: &str, test: impl FnOnce() -> Result<()>) -> Result<()> {
        let start = Instant::now();
        match test() {
            Ok(()) => {
                self.passed += 1;
                print(&format!("test {name} ... ok ({:.0} s)", start.elapsed().as_secs_f32()))
            }
            Err(error) => {
                self.failed += 1;
                print(&format!("test {name} ... FAILED: {error:#}"))
            }
        }
    }

    /// Prints the total under this label.
    ///
    /// # Errors
    /// A test failed.
    pub fn end(self, label: &str) -> Result<()> {
        print(&format!("{label}: {} passed, {} failed", self.passed, self.failed))?;
        if self.failed > 0 {
            bail!("{} of the tests of {label} failed", self.failed);
        }
        Ok(())
    }
}

/// Polls until the check succeeds; after the deadline, returns its last error.
pub fn wait_until<T>(what: &str, limit: Duration, mut check: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match check() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= deadline => {
                return Err(error.context(format!("{what}: not within {} s", limit.as_secs())));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_names_program_and_quotes_its_output() {
        let error = run("sh", ["-c", "echo useful >&2; exit 3"]).unwrap_err().to_string();
        assert!(error.contains("`sh -c") && error.contains("useful"), "{error}");
    }

    #[test]
    fn waiting_ends_with_the_last_reason() {
        let error = wait_until::<()>("the moon", Duration::ZERO, || bail!("cloudy")).unwrap_err();
        assert_eq!(format!("{error:#}"), "the moon: not within 0 s: cloudy");
    }
}
