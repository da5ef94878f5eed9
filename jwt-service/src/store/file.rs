//! Jobs in one file of a state directory, safe against SIGKILL and loss of power at any moment.
//!
//! The file is a log: one line for each change, with a checksum, appended and synced before the change is
//! acknowledged. (One file for each job would need no compaction, but two syncs for each change and no way to
//! share them. Here all changes that wait share one sync, which is what carries ten thousand jobs that are
//! each rewritten every few seconds.)
//!
//! * A write that was cut off leaves a last line without its end. Nobody was told that it is stored, and the
//!   next start drops it.
//! * Compaction, at every start and whenever the log has doubled, writes the live jobs to a new file, syncs it,
//!   renames it over the log and syncs the directory: there is always one whole log.
//! * After an error nobody knows what is on the disk (a failed sync may have dropped what was written before),
//!   so the next change begins with a compaction. So does the first one after a start on a full disk: the old log
//!   stays as it is until then.
//! * A line that is not as it was written is moved to `jobs.corrupt`, and its job is as the line before left it.

use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, DirBuilder, File, TryLockError},
    io::{self, BufRead as _, BufReader, BufWriter, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use async_trait::async_trait;
use sha2::{Digest as _, Sha256};
use tokio::sync::{mpsc, oneshot};
use zeroize::Zeroizing;

use super::{Store, StoreError, wire};
use crate::delegation::{JobKey, StoredJob};

const KIND: &str = "file";
const LOG: &str = "jobs.log";
const NEW_LOG: &str = "jobs.new";
const CORRUPT: &str = "jobs.corrupt";
const LOCK: &str = "lock";

/// How many changes wait for the disk before their callers do.
const QUEUE: usize = 1024;
/// How many bytes of changes a log takes before it is compacted, if it was not longer than that to begin with.
const SMALL: u64 = 1024 * 1024;
/// Checksum, sign and line end beside a value.
const MAX_LINE: u64 = wire::MAX_VALUE as u64 + 64;
/// Of unreadable lines, how many bytes are kept for somebody to look at.
const MAX_CORRUPT: usize = 1024 * 1024;
/// A predecessor that is being replaced gets two seconds to end.
const LOCK_TRIES: usize = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// A store in a directory of this machine. One process at a time.
pub struct FileStore {
    directory: PathBuf,
    requests: mpsc::Sender<Request>,
}

impl FileStore {
    /// Opens the store in `directory`, which is made if it is not there (mode 0700; the files have 0600).
    ///
    /// # Errors
    /// [`StoreError`]: the directory cannot be written, or another process uses it. Lines that are not readable
    /// are no error: they are logged and moved aside.
    pub async fn open(directory: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let directory = directory.into();
        let opened = {
            let directory = directory.clone();
            tokio::task::spawn_blocking(move || Log::open(directory))
        };
        let log = opened.await.map_err(failed("open"))?.map_err(failed("open"))?;
        let (requests, queue) = mpsc::channel(QUEUE);
        thread::Builder::new()
            .name("job-store".to_owned())
            .spawn(move || work(log, queue))
            .map_err(failed("open"))?;
        Ok(Self { directory, requests })
    }

    async fn ask<T>(
        &self,
        doing: &'static str,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, StoreError> {
        let (done, answer) = oneshot::channel();
        self.requests.send(request(done)).await.map_err(|_| failed(doing)(FileError::Ended))?;
        answer.await.map_err(|_| failed(doing)(FileError::Ended))
    }

    async fn change(&self, doing: &'static str, change: Change) -> Result<(), StoreError> {
        self.ask(doing, |done| Request::Change(change, done)).await?.map_err(failed(doing))
    }
}

#[async_trait]
impl Store for FileStore {
    async fn put(&self, job: &StoredJob) -> Result<(), StoreError> {
        self.change("write a job", Change::Put(job.clone())).await
    }

    async fn remove(&self, key: &JobKey) -> Result<(), StoreError> {
        self.change("remove a job", Change::Remove(key.clone())).await
    }

    async fn load(&self) -> Result<Vec<StoredJob>, StoreError> {
        self.ask("load the jobs", Request::Load).await
    }

    async fn lease(&self, _: &JobKey, _: &str, _: Duration) -> Result<bool, StoreError> {
        Ok(true)
    }

    async fn release(&self, _: &JobKey, _: &str) -> Result<(), StoreError> {
        Ok(())
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.ask("answer", Request::Check).await?.map_err(failed("answer"))
    }

    fn kind(&self) -> &'static str {
        KIND
    }
}

impl fmt::Debug for FileStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileStore").field("directory", &self.directory).finish_non_exhaustive()
    }
}

enum Change {
    Put(StoredJob),
    Remove(JobKey),
}

/// One failure answers every change that shared the sync.
type Outcome = Result<(), Arc<FileError>>;

enum Request {
    Change(Change, oneshot::Sender<Outcome>),
    Load(oneshot::Sender<Vec<StoredJob>>),
    Check(oneshot::Sender<Outcome>),
}

#[derive(Debug, thiserror::Error)]
enum FileError {
    #[error("the state directory {0} is in use by another process; give each its own")]
    InUse(PathBuf),
    #[error("{path} cannot be {doing}; see that the disk is not full and this process may write there")]
    Io { path: PathBuf, doing: &'static str, source: io::Error },
    #[error("the store's thread has ended")]
    Ended,
}

fn failed<E: std::error::Error + Send + Sync + 'static>(doing: &'static str) -> impl Fn(E) -> StoreError {
    move |source| StoreError { kind: KIND, doing, source: Box::new(source) }
}

fn io(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError::Io { path, doing, source }
}

/// The store's thread: it ends when the store is dropped.
fn work(mut log: Log, mut queue: mpsc::Receiver<Request>) {
    let mut batch = Vec::new();
    while let Some(first) = queue.blocking_recv() {
        batch.push(first);
        while batch.len() < QUEUE
            && let Ok(next) = queue.try_recv()
        {
            batch.push(next);
        }
        let (mut changes, mut waiting, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for request in batch.drain(..) {
            match request {
                Request::Change(change, done) => {
                    changes.push(change);
                    waiting.push(done);
                }
                other => others.push(other),
            }
        }
        let outcome = if changes.is_empty() { Ok(()) } else { log.write(changes).map_err(Arc::new) };
        // Whoever has gone away does not wait for an answer.
        for done in waiting {
            let _ = done.send(outcome.clone());
        }
        for request in others {
            match request {
                Request::Load(done) => drop(done.send(log.jobs.values().cloned().collect())),
                Request::Check(done) => drop(done.send(log.check().map_err(Arc::new))),
                Request::Change(..) => {}
            }
        }
    }
}

/// The log and what it says.
struct Log {
    directory: PathBuf,
    /// None while it is not known that the file on the disk says what `jobs` says.
    file: Option<File>,
    jobs: BTreeMap<JobKey, StoredJob>,
    /// Lines that are still to be moved aside.
    corrupt: Corrupt,
    /// Bytes at the last compaction, and since.
    compact: u64,
    appended: u64,
    /// Held as long as the log is.
    _lock: File,
}

impl Log {
    fn open(directory: PathBuf) -> Result<Self, FileError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&directory);
        made.map_err(io(&directory, "made"))?;
        let lock = lock(&directory)?;
        let path = directory.join(LOG);
        let (jobs, corrupt) = match File::open(&path) {
            Ok(file) => read(BufReader::new(file)).map_err(io(&path, "read"))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Default::default(),
            Err(error) => return Err(io(&path, "read")(error)),
        };
        let mut log = Self { directory, file: None, jobs, corrupt, compact: 0, appended: 0, _lock: lock };
        match log.compact() {
            Ok(()) => {}
            // Whoever restarts on a full disk must have their jobs, and users their tokens.
            Err(FileError::Io { source, path, .. }) if is_full(&source) => {
                tracing::error!(path = %path.display(), %source, "jobs are kept in memory until there is room");
            }
            Err(error) => return Err(error),
        }
        Ok(log)
    }

    /// Makes changes durable, all or, as far as anybody knows, none.
    fn write(&mut self, changes: Vec<Change>) -> Result<(), FileError> {
        let mut lines = Zeroizing::new(Vec::new());
        for change in changes {
            match change {
                Change::Put(job) => {
                    put_line(&mut lines, &job);
                    self.jobs.insert(job.params.key.clone(), job);
                }
                Change::Remove(key) => {
                    if self.jobs.remove(&key).is_some() {
                        line(&mut lines, b'-', wire::field(&key).as_bytes());
                    }
                }
            }
        }
        if lines.is_empty() && self.file.is_some() {
            return Ok(());
        }
        self.appended += lines.len() as u64;
        // Until this has succeeded, what is on the disk is not known.
        match self.file.take() {
            Some(mut file) if self.appended <= self.compact.max(SMALL) => {
                file.write_all(&lines)
                    .and_then(|()| file.sync_data())
                    .map_err(io(&self.directory.join(LOG), "written"))?;
                self.file = Some(file);
                Ok(())
            }
            Some(_) | None => self.compact(),
        }
    }

    fn compact(&mut self) -> Result<(), FileError> {
        self.file = None;
        self.move_aside()?;
        let (file, length) = write_new(&self.directory, &self.jobs)?;
        (self.file, self.compact, self.appended) = (Some(file), length, 0);
        Ok(())
    }

    /// Keeps unreadable lines for somebody to look at, before the log is written without them.
    fn move_aside(&mut self) -> Result<(), FileError> {
        if self.corrupt.lines > 0 {
            let path = self.directory.join(CORRUPT);
            private(&path)
                .and_then(|mut file| file.write_all(&self.corrupt.bytes))
                .map_err(io(&path, "written"))?;
            let lines = std::mem::take(&mut self.corrupt).lines;
            tracing::warn!(lines, moved_to = %path.display(), "the job log has unreadable lines");
        }
        Ok(())
    }

    /// Whether the disk takes writes, and takes them where the next start will look for them.
    fn check(&mut self) -> Result<(), FileError> {
        let path = self.directory.join(LOG);
        let there = fs::metadata(&path).ok().map(|there| (there.dev(), there.ino()));
        let ours = self.file.as_ref().and_then(|file| file.metadata().ok());
        match self.file.take().filter(|_| ours.map(|ours| (ours.dev(), ours.ino())) == there) {
            Some(file) => {
                file.sync_data().map_err(io(&path, "written"))?;
                self.file = Some(file);
                Ok(())
            }
            None => self.compact(),
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Keeps other processes out until the file is closed, at the latest by the death of this process.
fn lock(directory: &Path) -> Result<File, FileError> {
    let path = directory.join(LOCK);
    let file = private(&path).map_err(io(&path, "made"))?;
    for _ in 0..LOCK_TRIES {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => thread::sleep(LOCK_PAUSE),
            Err(TryLockError::Error(error)) => return Err(io(&path, "locked")(error)),
        }
    }
    Err(FileError::InUse(directory.to_owned()))
}

/// A new file that only this user may read.
fn private(path: &Path) -> io::Result<File> {
    File::options().write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// Writes a log of these jobs in the place of what is there, whole or not at all. Returns its length, too.
fn write_new(directory: &Path, jobs: &BTreeMap<JobKey, StoredJob>) -> Result<(File, u64), FileError> {
    let (new, log) = (directory.join(NEW_LOG), directory.join(LOG));
    let write = || {
        let mut out = BufWriter::new(private(&new)?);
        let (mut lines, mut length) = (Zeroizing::new(Vec::new()), 0);
        for job in jobs.values() {
            lines.clear();
            put_line(&mut lines, job);
            length += lines.len() as u64;
            out.write_all(&lines)?;
        }
        let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        Ok((file, length))
    };
    let written = write().map_err(io(&new, "written"))?;
    fs::rename(&new, &log).and_then(|()| File::open(directory)?.sync_all()).map_err(io(&log, "replaced"))?;
    Ok(written)
}

fn put_line(lines: &mut Vec<u8>, job: &StoredJob) {
    line(lines, b'+', wire::encode(job).as_bytes());
}

/// `<checksum> <sign><JSON>`; JSON has no line ends in it.
fn line(lines: &mut Vec<u8>, sign: u8, json: &[u8]) {
    lines.extend_from_slice(checksum(&[sign], json).as_bytes());
    lines.extend_from_slice(&[b' ', sign]);
    lines.extend_from_slice(json);
    lines.push(b'\n');
}

/// Against the disk, not against an enemy: who can write the file can write the jobs.
fn checksum(sign: &[u8], json: &[u8]) -> String {
    let digest = Sha256::new().chain_update(sign).chain_update(json).finalize();
    digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[derive(Default)]
struct Corrupt {
    lines: usize,
    bytes: Zeroizing<Vec<u8>>,
}

impl Corrupt {
    fn add(&mut self, line: &[u8]) {
        self.lines += 1;
        let room = MAX_CORRUPT.saturating_sub(self.bytes.len());
        self.bytes.extend_from_slice(line.get(..room).unwrap_or(line));
    }
}

/// What a log says, and which lines say nothing.
fn read(mut log: impl io::BufRead) -> io::Result<(BTreeMap<JobKey, StoredJob>, Corrupt)> {
    let (mut jobs, mut corrupt) = (BTreeMap::new(), Corrupt::default());
    let mut bytes = Zeroizing::new(Vec::new());
    // Whether the line that comes is the rest of one that was too long.
    let mut rest = false;
    loop {
        bytes.clear();
        let length = log.by_ref().take(MAX_LINE).read_until(b'\n', &mut bytes)?;
        if bytes.pop_if(|last| *last == b'\n').is_none() {
            if (length as u64) < MAX_LINE {
                // The end of the file. Whatever stands there was being written when the process died.
                return Ok((jobs, corrupt));
            }
            if !rest {
                corrupt.add(&bytes);
            }
            rest = true;
        } else if std::mem::take(&mut rest) {
            continue;
        } else {
            match parse(&bytes) {
                Some(Change::Put(job)) => drop(jobs.insert(job.params.key.clone(), job)),
                Some(Change::Remove(key)) => drop(jobs.remove(&key)),
                None => {
                    bytes.push(b'\n');
                    corrupt.add(&bytes);
                }
            }
        }
    }
}

fn parse(line: &[u8]) -> Option<Change> {
    let (sum, rest) = line.split_at_checked(16)?;
    let (sign, json) = rest.strip_prefix(b" ")?.split_at_checked(1)?;
    if sum != checksum(sign, json).as_bytes() {
        return None;
    }
    match sign {
        b"+" => wire::decode(json).ok().map(Change::Put),
        b"-" => wire::parse_field(json).ok().map(Change::Remove),
        _ => None,
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use proptest::prelude::*;

    use super::{super::wire::tests::job, *};

    fn written(changes: &[Change]) -> Vec<u8> {
        let mut lines = Vec::new();
        for change in changes {
            match change {
                Change::Put(job) => put_line(&mut lines, job),
                Change::Remove(key) => line(&mut lines, b'-', wire::field(key).as_bytes()),
            }
        }
        lines
    }

    fn jobs_in(log: &[u8]) -> Vec<StoredJob> {
        read(log).unwrap().0.into_values().collect()
    }

    #[tokio::test]
    async fn jobs_survive_the_store() {
        let state = tempfile::tempdir().unwrap();
        let directory = state.path().join("not/yet/there");
        let store = FileStore::open(&directory).await.unwrap();
        store.put(&job("a", "1")).await.unwrap();
        store.put(&job("b", "2")).await.unwrap();
        store.put(&job("a", "3")).await.unwrap();
        store.remove(&job("b", "2").params.key).await.unwrap();
        store.remove(&job("c", "4").params.key).await.unwrap();
        store.check().await.unwrap();
        drop(store);
        let store = FileStore::open(&directory).await.unwrap();
        assert_eq!(store.load().await.unwrap(), [job("a", "3")]);
        for entry in fs::read_dir(&directory).unwrap() {
            let entry = entry.unwrap();
            let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600, "{}", entry.path().display());
        }
        assert_eq!(fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[tokio::test]
    async fn a_directory_belongs_to_one_store() {
        let state = tempfile::tempdir().unwrap();
        let store = FileStore::open(state.path()).await.unwrap();
        let error = FileStore::open(state.path()).await.unwrap_err();
        assert!(error.source.to_string().contains("in use by another process"), "{}", error.source);
        drop(store);
        FileStore::open(state.path()).await.unwrap();
    }

    #[tokio::test]
    async fn a_damaged_line_is_moved_aside_and_costs_only_itself() {
        let state = tempfile::tempdir().unwrap();
        let mut log = written(&[Change::Put(job("a", "1")), Change::Put(job("b", "2"))]);
        let first = log.iter().position(|b| *b == b'\n').unwrap();
        log[first - 3] ^= 1;
        log.extend(b"nonsense\n");
        fs::write(state.path().join(LOG), &log).unwrap();
        let store = FileStore::open(state.path()).await.unwrap();
        assert_eq!(store.load().await.unwrap(), [job("b", "2")]);
        let aside = fs::read(state.path().join(CORRUPT)).unwrap();
        assert_eq!(aside, [&log[..=first], b"nonsense\n"].concat());
        drop(store);
        fs::remove_file(state.path().join(CORRUPT)).unwrap();
        FileStore::open(state.path()).await.unwrap();
        assert!(!state.path().join(CORRUPT).exists(), "they are purged from the log");
    }

    #[tokio::test]
    async fn a_lost_directory_fails_the_check_and_a_returned_one_has_the_jobs_again() {
        let state = tempfile::tempdir().unwrap();
        let directory = state.path().join("jobs");
        let store = FileStore::open(&directory).await.unwrap();
        store.put(&job("a", "1")).await.unwrap();
        fs::rename(&directory, state.path().join("elsewhere")).unwrap();
        store.check().await.unwrap_err();
        store.put(&job("b", "2")).await.unwrap_err();
        fs::create_dir(&directory).unwrap();
        store.check().await.unwrap();
        let log = fs::read(directory.join(LOG)).unwrap();
        assert_eq!(jobs_in(&log), [job("a", "1"), job("b", "2")]);
    }

    #[tokio::test]
    async fn a_start_on_a_full_disk_keeps_what_is_there_until_there_is_room() {
        let state = tempfile::tempdir().unwrap();
        let mut old = written(&[Change::Put(job("a", "1")), Change::Put(job("b", "2"))]);
        old.extend(b"nonsense\n");
        fs::write(state.path().join(LOG), &old).unwrap();
        for full in [CORRUPT, NEW_LOG] {
            let full = state.path().join(full);
            std::os::unix::fs::symlink("/dev/full", &full).unwrap();
            let store = FileStore::open(state.path()).await.unwrap();
            assert_eq!(store.load().await.unwrap(), [job("a", "1"), job("b", "2")]);
            store.check().await.unwrap_err();
            store.put(&job("c", "3")).await.unwrap_err();
            assert_eq!(fs::read(state.path().join(LOG)).unwrap(), old);
            fs::remove_file(full).unwrap();
            drop(store);
        }
        let store = FileStore::open(state.path()).await.unwrap();
        store.check().await.unwrap();
        assert_eq!(fs::read(state.path().join(CORRUPT)).unwrap(), b"nonsense\n");
        let store_jobs = store.load().await.unwrap();
        assert_eq!(store_jobs, jobs_in(&fs::read(state.path().join(LOG)).unwrap()));
        assert_eq!(store_jobs, [job("a", "1"), job("b", "2")]);
    }

    #[tokio::test]
    async fn a_store_that_began_on_a_full_disk_writes_once_there_is_room() {
        let state = tempfile::tempdir().unwrap();
        fs::write(state.path().join(LOG), written(&[Change::Put(job("a", "1"))])).unwrap();
        let full = state.path().join(NEW_LOG);
        std::os::unix::fs::symlink("/dev/full", &full).unwrap();
        let store = FileStore::open(state.path()).await.unwrap();
        store.put(&job("b", "2")).await.unwrap_err();
        fs::remove_file(full).unwrap();
        store.put(&job("b", "2")).await.unwrap();
        assert_eq!(jobs_in(&fs::read(state.path().join(LOG)).unwrap()), [job("a", "1"), job("b", "2")]);
    }

    #[test]
    fn a_log_does_not_grow_for_ever() {
        let state = tempfile::tempdir().unwrap();
        let mut log = Log::open(state.path().to_owned()).unwrap();
        let long = "x".repeat(60_000);
        for n in 0..100 {
            log.write(vec![Change::Put(job(&long, &n.to_string()))]).unwrap();
            let length = fs::metadata(state.path().join(LOG)).unwrap().len();
            assert!(length < 2 * SMALL, "{length} bytes after {n} changes");
        }
        assert_eq!(jobs_in(&fs::read(state.path().join(LOG)).unwrap()), [job(&long, "99")]);
    }

    #[test]
    fn a_line_that_is_too_long_is_skipped_to_its_end() {
        let mut log = written(&[Change::Put(job("a", "1"))]);
        log.extend(vec![b'x'; 3 * usize::try_from(MAX_LINE).unwrap() + 5]);
        log.push(b'\n');
        log.extend(written(&[Change::Put(job("b", "2"))]));
        let (jobs, corrupt) = read(&log[..]).unwrap();
        assert_eq!(jobs.into_values().collect::<Vec<_>>(), [job("a", "1"), job("b", "2")]);
        assert_eq!((corrupt.lines, corrupt.bytes.len()), (1, MAX_CORRUPT));
    }

    proptest! {
        /// Wherever a write is cut off, every change before it is there and nothing else.
        #[test]
        fn a_log_cut_off_anywhere_says_what_was_whole(
            changes in prop::collection::vec((any::<bool>(), 0..4_u8), 1..12), cut: prop::sample::Index,
        ) {
            let changes: Vec<_> = changes.iter().enumerate().map(|(n, (put, key))| {
                let job = job(&key.to_string(), &n.to_string());
                if *put { Change::Put(job) } else { Change::Remove(job.params.key) }
            }).collect();
            let log = written(&changes);
            let cut = cut.index(log.len() + 1);
            let mut expected = BTreeMap::new();
            let mut end = 0;
            for change in changes {
                end += written(std::slice::from_ref(&change)).len();
                if end > cut { break; }
                match change {
                    Change::Put(job) => drop(expected.insert(job.params.key.clone(), job)),
                    Change::Remove(key) => drop(expected.remove(&key)),
                }
            }
            let (jobs, corrupt) = read(&log[..cut]).unwrap();
            prop_assert_eq!(jobs, expected);
            prop_assert_eq!(corrupt.lines, 0);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = read(&bytes[..]);
        }
    }
}
