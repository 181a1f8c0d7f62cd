//! Writer of the state directory, in its own thread: a stalled disk must not delay the data plane.
//!
//! Only the latest content of a file is queued. A failed write is retried until it succeeds or newer content replaces
//! it.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions, Permissions, rename};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// Delay before the retry of a failed write.
const RETRY: Duration = Duration::from_secs(30);
/// Views contain every Service and pod address of the cluster, so only the owner may read them.
const FILE_MODE: u32 = 0o600;
const DIRECTORY_MODE: u32 = 0o700;

/// Operation on a file.
pub enum Content {
    /// Replace the file atomically.
    Bytes(Vec<u8>),
    /// Set the modification time to now.
    Touched,
    /// Remove the file.
    Removed,
}

struct Job {
    content: Content,
    written: Option<Box<dyn Fn() + Send>>,
    not_before: Option<Instant>,
}

#[derive(Default)]
struct Queue {
    waiting: BTreeMap<PathBuf, Job>,
    /// Start of the current write.
    writing: Option<Instant>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Handle of the writer thread, which exits once all clones are dropped and the queue is empty.
#[derive(Clone)]
pub struct StateFiles(Arc<Handle>);

struct Handle(Arc<Shared>);

impl StateFiles {
    /// Starts the thread.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let worker = shared.clone();
        std::thread::Builder::new().name("state-files".into()).spawn(move || work(&worker))?;
        Ok(StateFiles(Arc::new(Handle(shared))))
    }

    /// Queues `content` for `path` and returns immediately; `written` is called after the write. Replaces queued content
    /// of the same file.
    pub(crate) fn put(&self, path: &Path, content: Content, written: Option<Box<dyn Fn() + Send>>) {
        let shared = &self.0.0;
        let mut queue = shared.lock();
        let job = Job { content, written, not_before: None };
        match job.content {
            // A queued write sets the time as well.
            Content::Touched => {
                queue.waiting.entry(path.to_path_buf()).or_insert(job);
            }
            Content::Bytes(_) | Content::Removed => {
                queue.waiting.insert(path.to_path_buf(), job);
            }
        }
        shared.changed.notify_all();
    }

    /// Waits at most `limit` until everything queued was tried once; returns immediately if the current write is older
    /// than `limit`. Returns whether everything is on disk.
    pub fn flush(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let shared = &self.0.0;
        let mut queue = shared.lock();
        loop {
            let untried = queue.waiting.values().any(|job| job.not_before.is_none());
            if queue.writing.is_none() && !untried {
                return queue.waiting.is_empty();
            }
            let now = Instant::now();
            let stalled = queue.writing.is_some_and(|since| now.saturating_duration_since(since) > limit);
            if stalled || now >= deadline {
                return false;
            }
            queue = match shared.changed.wait_timeout(queue, deadline - now) {
                Ok((queue, _)) => queue,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.changed.notify_all();
    }
}

/// Runs `read` in its own thread and returns its result; `None` after `limit`, or without a thread.
pub fn within<T: Send + 'static>(limit: Duration, read: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().name("state-reader".into());
    // A late result has no receiver.
    thread.spawn(move || drop(sender.send(read()))).ok()?;
    receiver.recv_timeout(limit).ok()
}

fn work(shared: &Shared) {
    let mut queue = shared.lock();
    loop {
        let now = Instant::now();
        let due = |job: &Job| job.not_before.is_none_or(|at| at <= now);
        let next = queue.waiting.iter().find(|(_, job)| due(job)).map(|(path, _)| path.clone());
        if let Some((path, job)) = next.and_then(|path| queue.waiting.remove_entry(&path)) {
            queue.writing = Some(now);
            drop(queue);
            let failed = store(&path, job).err();
            queue = shared.lock();
            queue.writing = None;
            if let Some(job) = failed {
                queue.waiting.entry(path).or_insert(job);
            }
            shared.changed.notify_all();
        } else if queue.closed {
            return;
        } else {
            let until = queue.waiting.values().filter_map(|job| job.not_before).min();
            let pause = until.map_or(Duration::MAX, |until| until.saturating_duration_since(now));
            queue = match shared.changed.wait_timeout(queue, pause.min(RETRY)) {
                Ok((queue, _)) => queue,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

/// Executes the job; returns a failed one for a retry.
fn store(path: &Path, job: Job) -> Result<(), Job> {
    let result = match &job.content {
        Content::Bytes(bytes) => replace(path, bytes),
        Content::Removed => remove(path),
        Content::Touched => match File::open(path).and_then(|file| file.set_modified(SystemTime::now())) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        },
    };
    match result {
        Ok(()) => {
            if let Some(written) = &job.written {
                written();
            }
            Ok(())
        }
        Err(error) => {
            tracing::warn!(
                path = %path.display(), %error, retry_in_s = RETRY.as_secs(),
                "cannot write a state file; the next agent on this node would start with its old content"
            );
            Err(Job { not_before: Some(Instant::now() + RETRY), ..job })
        }
    }
}

/// Creates the state directory with access for its owner only. Leaves an existing one unchanged.
///
/// # Errors
/// It cannot be created.
pub(crate) fn create_directory(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(directory)
}

/// Replaces the file atomically: after a crash it has either the old or the new content.
///
/// # Errors
/// The directory or the file cannot be written.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    create_directory(directory)?;
    let temporary = temporary(path);
    let written = write_temporary(&temporary, bytes).and_then(|()| rename(&temporary, path));
    if written.is_err() {
        // A part of the content would occupy the rest of a full disk.
        let _ = remove(&temporary);
    }
    written?;
    File::open(directory)?.sync_all()
}

fn write_temporary(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(FILE_MODE).open(path)?;
    // A leftover of an interrupted write may have another mode.
    file.set_permissions(Permissions::from_mode(FILE_MODE))?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Returns the path of the temporary file that replaces `path`.
#[must_use]
pub(crate) fn temporary(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// Removes the file; an absent file is no error.
///
/// # Errors
/// It exists and cannot be removed.
pub fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn bytes(text: &str) -> Content {
        Content::Bytes(text.as_bytes().to_vec())
    }

    #[test]
    fn files_replaced_removed_and_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state/view");
        let files = StateFiles::start().unwrap();
        files.put(&path, bytes("one"), None);
        assert!(files.flush(LIMIT));
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        files.put(&path, bytes("two"), None);
        files.put(&path, Content::Touched, None);
        assert!(files.flush(LIMIT));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "two", "touching loses no content");
        files.put(&path, Content::Removed, None);
        files.put(&directory.path().join("absent"), Content::Touched, None);
        assert!(files.flush(LIMIT));
        assert!(!path.exists());
    }

    #[test]
    fn readable_leftover_becomes_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("view");
        std::fs::write(temporary(&path), "left").unwrap();
        std::fs::set_permissions(temporary(&path), Permissions::from_mode(0o644)).unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn failed_write_kept_and_reported() {
        let directory = tempfile::tempdir().unwrap();
        let blocked = directory.path().join("file/view");
        std::fs::write(directory.path().join("file"), "not a directory").unwrap();
        let files = StateFiles::start().unwrap();
        files.put(&blocked, bytes("one"), None);
        assert!(!files.flush(LIMIT));
        let other = directory.path().join("other");
        files.put(&other, bytes("two"), None);
        assert!(!files.flush(LIMIT), "the first still waits");
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "two", "other files are not delayed");
    }

    #[test]
    fn stalled_disk_delays_the_caller_a_bounded_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("view");
        // Opening a pipe for writing waits for a reader.
        let pipe = std::ffi::CString::new(temporary(&path).into_os_string().into_encoded_bytes()).unwrap();
        // SAFETY: the path is a valid string that lives through the call.
        assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
        let files = StateFiles::start().unwrap();
        let began = Instant::now();
        files.put(&path, bytes("one"), None);
        assert!(!files.flush(Duration::from_millis(100)));
        std::thread::sleep(Duration::from_millis(50));
        for _ in 0..100 {
            assert!(!files.flush(Duration::from_millis(100)), "it does not wait again and again");
        }
        assert!(began.elapsed() < Duration::from_secs(5));
        // The reader lets the thread end; its fsync of a pipe fails, which leaves the content waiting.
        drop(File::open(temporary(&path)).unwrap());
    }
}
