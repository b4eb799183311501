//! One repository on the hub: its file list at one commit, and downloads that are checked.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;
use sha1::Sha1;
use sha2::Sha256;

use super::HubId;
use super::http::{Failure, Http, Meta, PATIENCE, encoded};
use crate::checkpoint::destination::{check_free, taken};
use crate::checkpoint::digest;
use crate::checkpoint::files::{self, Stamp};
use crate::error::{Error, Result};
use crate::pipeline::progress::Progress;

/// Tries in a row that bring no new byte.
const TRIES: u32 = 4;

/// What the environment says about the hub.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where downloads lie: HF_HUB_CACHE, else `hub` in HF_HOME.
    pub cache: PathBuf,
    /// HF_TOKEN, else what HF_TOKEN_PATH or the file `token` in HF_HOME holds.
    pub token: Option<String>,
    /// HF_ENDPOINT, else the public hub.
    pub endpoint: String,
    /// HF_HUB_OFFLINE: only the cache is asked.
    pub offline: bool,
    /// HF_HUB_DOWNLOAD_TIMEOUT, in seconds: how long nobody is waited for longer, for a connection, an answer, the next byte.
    pub patience: Duration,
    /// Where it is noted which files of the cache have the hash that they are named by.
    pub verified: Option<PathBuf>,
}

impl Settings {
    /// Reads the environment.
    pub fn from_env() -> Result<Self> {
        let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let home = match (var("HF_HOME"), var("XDG_CACHE_HOME"), var("HOME")) {
            (Some(home), _, _) => PathBuf::from(home),
            (None, Some(cache), _) => Path::new(&cache).join("huggingface"),
            (None, None, Some(home)) => Path::new(&home).join(".cache/huggingface"),
            (None, None, None) => {
                return Err(Error::Refused("neither HF_HOME nor HOME is set: there is no place for downloads".into()));
            }
        };
        let cache = var("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from);
        let stored =
            || files::read_text_if_there(&var("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from));
        let token = var("HF_TOKEN").map_or_else(stored, |token| Ok(Some(token)))?;
        let token = token.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let offline =
            var("HF_HUB_OFFLINE").is_some_and(|v| !["0", "false", "no", "off"].contains(&v.to_lowercase().as_str()));
        let patience = match var("HF_HUB_DOWNLOAD_TIMEOUT").map(|s| s.parse::<f64>()) {
            None => PATIENCE,
            Some(Ok(s)) if s > 0.0 && s < 1e6 => Duration::from_secs_f64(s),
            Some(_) => return Err(Error::Refused("HF_HUB_DOWNLOAD_TIMEOUT is no number of seconds".into())),
        };
        let own = var("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| Some(Path::new(&var("HOME")?).join(".cache")));
        let verified = own.map(|dir| dir.join("gptoss/verified"));
        let endpoint = endpoint.trim_end_matches('/').into();
        Ok(Self { cache, token, endpoint, offline, patience, verified })
    }
}

fn is_hash(text: &str, lengths: &[usize]) -> bool {
    lengths.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// A repository as it is asked for.
pub(super) struct Hub<'a> {
    pub(super) id: &'a HubId,
    pub(super) kind: RepoType,
    pub(super) settings: &'a Settings,
}

/// The hub's answer for a repository, as far as it is wanted.
#[derive(Deserialize)]
struct Found {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// A repository at one commit.
pub(super) struct Listing {
    pub(super) commit: String,
    /// Its files, as the hub names them: not to be trusted as paths.
    pub(super) names: Vec<String>,
}

impl Hub<'_> {
    /// The files of the revision, and the commit that it is.
    pub(super) fn list(&self) -> Result<Listing> {
        let http = Http::new(self.settings);
        let kind = if matches!(self.kind, RepoType::Dataset) { "datasets" } else { "models" };
        let revision = encoded(&self.id.revision).replace('/', "%2F");
        let url = format!("{}/api/{kind}/{}/revision/{revision}", self.settings.endpoint, self.id.repo);
        let found: Found = self.patiently(|| http.json(&url)).map_err(|e| self.explain(e, "the repository"))?;
        let commit = found.sha;
        if !is_hash(&commit, &[40, 64]) {
            return Err(self.error(format!("the hub calls its commit {commit:?}, which is no hash")));
        }
        Ok(Listing { commit, names: found.siblings.into_iter().map(|s| s.rfilename).collect() })
    }

    /// Downloads `names`, which must be safe as paths, and gives the folder in which they lie.
    pub(super) fn get(&self, listing: &Listing, names: &[&str], progress: &Progress) -> Result<PathBuf> {
        let Listing { commit, .. } = listing;
        let http = Http::new(self.settings);
        let cache = Cache::new(self.settings.cache.clone());
        let repo = cache.repo(self.repo(commit));
        progress.note(&format!("{}: {} files of commit {commit}", self.id.repo, names.len()));
        for name in names {
            self.download(&http, &repo, commit, name, progress)?;
        }
        // Beside the commit, remember the name, so that the next run finds it offline.
        let named = cache.repo(self.repo(&self.id.revision));
        named.create_ref(commit).map_err(Error::io("write a reference in", &self.settings.cache))?;
        Ok(repo.pointer_path(commit))
    }

    /// The snapshot that the cache has, and its commit.
    pub(super) fn cached(&self) -> Result<(PathBuf, String)> {
        let (revision, cache) = (&self.id.revision, &self.settings.cache);
        let folder = cache.join(self.repo(revision).folder_name());
        let named = files::read_text_if_there(&folder.join("refs").join(revision))?;
        let commit = named.map_or_else(|| revision.clone(), |c| c.trim().to_owned());
        let dir = folder.join("snapshots").join(&commit);
        if commit.contains("..") || !dir.is_dir() {
            return Err(self.not_cached("it"));
        }
        self.check_snapshot(&dir)?;
        Ok((dir, commit))
    }

    /// The cache lacks something, and nobody else may be asked.
    pub(super) fn not_cached(&self, what: &str) -> Error {
        let cache = self.settings.cache.display();
        self.error(format!("HF_HUB_OFFLINE is set, and the cache {cache} does not have {what}; run once without"))
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.repo.clone(), self.kind, revision.to_owned())
    }

    pub(super) fn error(&self, reason: impl Into<String>) -> Error {
        Error::Hub { repo: format!("{}@{}", self.id.repo, self.id.revision), reason: reason.into() }
    }

    /// Checks the files of a snapshot's folder, each once.
    fn check_snapshot(&self, dir: &Path) -> Result<()> {
        for entry in std::fs::read_dir(dir).map_err(Error::io("list", dir))? {
            self.check_file(&entry.map_err(Error::io("list", dir))?.path())?;
        }
        Ok(())
    }

    /// Checks a file of a snapshot, once, where it is a link to a blob that is named by its hash.
    ///
    /// # Errors
    /// [`Error::Hub`] where it has other bytes.
    pub(super) fn check_file(&self, path: &Path) -> Result<()> {
        let Ok(target) = std::fs::read_link(path) else { return Ok(()) };
        let hash = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !is_hash(&hash, &[40, 64]) {
            return Ok(());
        }
        let size = std::fs::metadata(path).map_err(Error::io("follow the link", path))?.len();
        let Some(damage) = self.damage(path, size, &hash)? else { return Ok(()) };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Err(self.error(format!(
            "{name} in the cache is damaged: {damage}; remove {} and run once without HF_HUB_OFFLINE",
            target.display()
        )))
    }

    /// [`damage`], where nobody looked yet at this file as it is now.
    fn damage(&self, blob: &Path, size: u64, etag: &str) -> Result<Option<String>> {
        let said = Stamp::at(blob)?.to_string() + "\n";
        let record = self.settings.verified.as_ref().map(|dir| dir.join(etag));
        if record.as_ref().is_some_and(|r| std::fs::read_to_string(r).is_ok_and(|t| t == said)) {
            return Ok(None);
        }
        let found = damage(blob, size, etag)?;
        if let (Some(record), None) = (record, &found) {
            // Without a record it is done again next time.
            let _ = std::fs::create_dir_all(record.parent().expect("it lies in a folder"));
            let _ = files::replace(&record, said.as_bytes());
        }
        Ok(found)
    }

    /// What a failure means for the user.
    fn explain(&self, failure: Failure, what: &str) -> Error {
        let endpoint = &self.settings.endpoint;
        let token = if self.settings.token.is_some() {
            "the token that was sent does not open it"
        } else {
            "no token was sent; set HF_TOKEN"
        };
        self.error(match failure {
            Failure::Status(code @ (401 | 403)) => {
                format!("the hub refuses {what} with status {code}: it is private or gated, or does not exist; {token}")
            }
            Failure::Status(404) => {
                format!("the hub does not have {what} (status 404): check the spelling of repository and revision")
            }
            Failure::Status(code) => format!("the hub answers {code} for {what}; try again later"),
            Failure::Passing(reason) => {
                format!("cannot get {what} from {endpoint}: {reason}; a cached copy loads with HF_HUB_OFFLINE=1")
            }
            Failure::Wrong(reason) => format!("the hub's answer for {what} cannot be: {reason}"),
            Failure::Ours(error) => return error,
        })
    }

    /// Tries again while the failure looks like the network's.
    fn patiently<T>(&self, mut f: impl FnMut() -> std::result::Result<T, Failure>) -> std::result::Result<T, Failure> {
        let mut tries = 0;
        loop {
            match f() {
                Err(e) if e.is_passing() && tries + 1 < TRIES => tries += 1,
                other => return other,
            }
            std::thread::sleep(Duration::from_millis(200 << tries));
        }
    }

    fn download(
        &self,
        http: &Http,
        cache: &hf_hub::CacheRepo,
        commit: &str,
        name: &str,
        progress: &Progress,
    ) -> Result<()> {
        let prefix = if matches!(self.kind, RepoType::Dataset) { "datasets/" } else { "" };
        let url = format!("{}/{prefix}{}/resolve/{commit}/{}", self.settings.endpoint, self.id.repo, encoded(name));
        let meta = self.patiently(|| http.meta(&url)).map_err(|e| self.explain(e, name))?;
        if meta.commit != commit {
            return Err(self.error(format!("the hub gives {name} of commit {}, wanted {commit}", meta.commit)));
        }
        if !is_hash(&meta.etag, &[40, 64]) {
            return Err(self.error(format!("the hub names {name} by {:?}, which is no hash", meta.etag)));
        }
        let (size, blob, pointer) = (meta.size, cache.blob_path(&meta.etag), cache.pointer_path(commit).join(name));
        if self.have(&blob, &meta, name, progress)? {
            return link(&pointer, &meta.etag, name);
        }
        for dir in [blob.parent(), pointer.parent()].into_iter().flatten() {
            std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        }
        let mut part = Part::lock(blob.with_extension("part"))?;
        // Whoever had it until now may have completed the file.
        if self.have(&blob, &meta, name, progress)? {
            remove(&part.path)?;
            return link(&pointer, &meta.etag, name);
        }
        check_free(blob.parent().expect("it lies in a folder"), size, taken(&part.path))?;
        // A part that is longer than the file, or exactly as long, is not trusted.
        if part.len()? >= size {
            part.empty()?;
        }
        let (mut tries, mut damaged) = (0, false);
        loop {
            let before = part.len()?;
            progress.start(name, size);
            match http.download(&url, &mut part, size, progress) {
                Ok(()) => match damage(&part.path, size, &meta.etag)? {
                    None => {
                        progress.finish();
                        std::fs::rename(&part.path, &blob).map_err(Error::io("rename the download to", &blob))?;
                        return link(&pointer, &meta.etag, name);
                    }
                    Some(reason) => {
                        part.empty()?;
                        if std::mem::replace(&mut damaged, true) {
                            return Err(self.error(format!("{name} arrived damaged twice: {reason}")));
                        }
                        progress.note(&format!("{name} arrived damaged ({reason}); once more from the start"));
                    }
                },
                Err(e) if e.is_passing() => {
                    let now = part.len()?;
                    tries = if now > before { 0 } else { tries + 1 };
                    if tries >= TRIES {
                        return Err(self.explain(e, name));
                    }
                    progress.note(&format!("{name}: the connection broke at {now} of {size} bytes; resuming"));
                    std::thread::sleep(Duration::from_millis(200 << tries));
                }
                Err(e) => return Err(self.explain(e, name)),
            }
        }
    }

    /// Whether the cache has the file that `meta` speaks of. One that it has with other bytes is removed; one that cannot be
    /// read stays, and is an error.
    fn have(&self, blob: &Path, meta: &Meta, name: &str, progress: &Progress) -> Result<bool> {
        if !files::is_there(blob)? {
            return Ok(false);
        }
        let Some(damage) = self.damage(blob, meta.size, &meta.etag)? else { return Ok(true) };
        progress.note(&format!("{name} in the cache is damaged ({damage}); it is fetched again"));
        remove(blob)?;
        Ok(false)
    }
}

/// A file that is being downloaded, locked: nobody else writes, renames or removes it meanwhile.
pub(super) struct Part {
    path: PathBuf,
    file: std::fs::File,
}

impl Part {
    fn lock(path: PathBuf) -> Result<Self> {
        let busy = || Error::Refused(format!("another program is downloading {}", path.display()));
        let file = files::open_own(&path, std::fs::OpenOptions::new().create(true).append(true))?;
        let lock = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
        lock.map_err(|_| busy())?;
        // Between opening and locking it may have been completed and renamed by another program.
        let meta = file.metadata().map_err(Error::io("look at", &path))?;
        if Stamp::at(&path).ok() != Some(Stamp::of(&meta)) {
            return Err(busy());
        }
        Ok(Self { path, file })
    }

    /// Bytes that are there.
    pub(super) fn len(&self) -> Result<u64> {
        Ok(self.file.metadata().map_err(Error::io("look at", &self.path))?.len())
    }

    /// Takes all bytes out.
    pub(super) fn empty(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(Error::io("write", &self.path))
    }

    /// Appends.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io("write", &self.path))
    }

    /// Makes it durable.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(Error::io("sync", &self.path))
    }
}

/// What is wrong with a file of this size and this hash, by which the hub names it: SHA-256 (64 digits), or git's SHA-1 of a
/// blob (40).
fn damage(file: &Path, size: u64, etag: &str) -> Result<Option<String>> {
    let opened = files::open(file)?;
    let have = opened.metadata().map_err(Error::io("look at", file))?.len();
    if have != size {
        return Ok(Some(format!("it has {have} bytes, wanted {size}")));
    }
    let digest = if etag.len() == 64 {
        digest::of_reader::<Sha256>(opened, &[])
    } else {
        digest::of_reader::<Sha1>(opened, format!("blob {size}\0").as_bytes())
    };
    let digest = digest.map_err(Error::io("read", file))?;
    Ok((!digest.eq_ignore_ascii_case(etag)).then(|| format!("its hash is {digest}, wanted {etag}")))
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(e)),
        _ => Ok(()),
    }
}

/// Gives the blob `etag` its name in a snapshot: a relative link, as the hub's own tools make it.
fn link(pointer: &Path, etag: &str, name: &str) -> Result<()> {
    let up = "../".repeat(2 + name.matches('/').count());
    let target = PathBuf::from(format!("{up}blobs/{etag}"));
    if std::fs::read_link(pointer).is_ok_and(|t| t == target) {
        return Ok(());
    }
    remove(pointer)?;
    if let Some(dir) = pointer.parent() {
        std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    }
    std::os::unix::fs::symlink(&target, pointer).map_err(Error::io("link", pointer))
}
