//! The hub: its cache first, then downloads that go on where they were cut.
//!
//! `hf-hub` knows the cache's layout, shared with Python. The transfers are our own, since its own go
//! wrong where a partial file is complete already, where a server ignores `Range`, and where a
//! connection stalls, and it compares no hashes.

mod web;

use std::fs::File;
use std::path::{Path, PathBuf};

use farm::config::WorkerConfig;
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use tokio_util::sync::CancellationToken;

use self::web::{Web, disk};
use crate::resolve::{HubId, INDEX, ResolveError, Wanted, is_plain, needed};

type Result<T, E = ResolveError> = std::result::Result<T, E>;

pub(crate) struct Hub {
    cache: Cache,
    offline: bool,
    web: Web,
}

impl Hub {
    pub(crate) fn new(config: &WorkerConfig, stop: CancellationToken) -> Self {
        let cache = match &config.hub_cache {
            Some(folder) => Cache::new(folder.join("hub")),
            None => Cache::from_env(),
        };
        let token = config.hub_token.as_ref().map(|token| token.0.clone()).or_else(|| cache.token());
        Self { cache, offline: config.offline, web: Web::new(config.hub_endpoint.as_deref(), token, stop) }
    }

    /// The snapshot folder of a repository, with every file that is wanted.
    pub(crate) fn folder(&self, id: &HubId, wanted: Wanted) -> Result<PathBuf> {
        let repo = Repo::with_revision(id.name.clone(), RepoType::Model, id.revision.clone());
        let cached = self.cached(&repo);
        let lacking = match &cached {
            Some(folder) => match lacking(folder, wanted) {
                Ok(()) => return Ok(folder.clone()),
                Err(lacking) => lacking,
            },
            None => "all of it".to_owned(),
        };
        let HubId { name, revision } = id;
        if self.offline {
            let cache = self.cache.path().display();
            return Err(ResolveError::Missing(format!(
                "`{name}` at `{revision}` is not whole in the hub's cache {cache} (missing: {lacking}) and this worker is offline: unset worker.offline (HF_HUB_OFFLINE) once, or copy the files there"
            )));
        }
        tracing::info!(checkpoint = name, revision, missing = lacking, "downloading from the hub");
        self.download(id, &self.cache.repo(repo), wanted)
    }

    /// The folder of the commit that a revision stood for when it was last seen.
    fn cached(&self, repo: &Repo) -> Option<PathBuf> {
        let root = self.cache.path().join(repo.folder_name());
        let commit = std::fs::read_to_string(root.join("refs").join(repo.revision()));
        let commit = commit.map_or_else(|_| repo.revision().to_owned(), |text| text.trim().to_owned());
        let folder = root.join("snapshots").join(commit);
        folder.is_dir().then_some(folder)
    }

    fn download(&self, id: &HubId, repo: &CacheRepo, wanted: Wanted) -> Result<PathBuf> {
        let info = self.web.info(id)?;
        let folder = repo.pointer_path(&info.sha);
        let files: Vec<_> = info.siblings.into_iter().map(|file| file.rfilename).filter(|file| is_file(file)).collect();
        let incomplete =
            |problem| ResolveError::Missing(format!("`{}` on {} lacks {problem}", id.name, self.web.endpoint()));
        if !files.iter().any(|file| file == INDEX) {
            return Err(incomplete(format!("{INDEX}: it is no checkpoint in diffusers layout")));
        }
        self.fetch(id, &info.sha, INDEX, repo)?;
        let index = read_index(&folder).map_err(incomplete)?;
        for file in needed(&index, &files, wanted).map_err(incomplete)? {
            self.fetch(id, &info.sha, &file, repo)?;
        }
        // Last: a revision that is in the cache is there whole, but for what was not wanted yet.
        repo.create_ref(&info.sha).map_err(disk)?;
        Ok(folder)
    }

    /// Brings one file into the snapshot folder of a commit.
    fn fetch(&self, id: &HubId, commit: &str, file: &str, repo: &CacheRepo) -> Result<()> {
        let pointer = repo.pointer_path(commit).join(file);
        if pointer.exists() {
            return Ok(());
        }
        let (url, content) = self.web.content(id, commit, file)?;
        let blob = repo.blob_path(&content.etag);
        std::fs::create_dir_all(blob.parent().expect("a blob lies in a folder")).map_err(disk)?;
        let lock = File::create(blob.with_extension("lock")).map_err(disk)?;
        lock.lock().map_err(disk)?;
        if !blob.exists() {
            self.web.transfer(&url, &content, &blob.with_extension("part"))?;
            std::fs::rename(blob.with_extension("part"), &blob).map_err(disk)?;
        }
        drop(lock);
        std::fs::create_dir_all(pointer.parent().expect("a file lies in a folder")).map_err(disk)?;
        link(&blob, &pointer, file.split('/').count()).map_err(disk)
    }
}

/// A name from the network that becomes a file's.
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 200 && !name.starts_with('.') && name.chars().all(is_plain)
}

/// A repository's file that may be stored under its own name.
fn is_file(path: &str) -> bool {
    path.split('/').count() <= 2 && path.split('/').all(is_name)
}

fn read_index(folder: &Path) -> Result<serde_json::Value, String> {
    let bytes = std::fs::read(folder.join(INDEX)).map_err(|_| INDEX.to_owned())?;
    serde_json::from_slice(&bytes).map_err(|error| format!("a readable {INDEX} ({error})"))
}

/// What a snapshot folder lacks for rendering.
fn lacking(folder: &Path, wanted: Wanted) -> Result<(), String> {
    let index = read_index(folder)?;
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()) {
        let part = entry.file_name();
        for file in std::fs::read_dir(entry.path()).into_iter().flatten().flatten() {
            // A link whose blob is gone is not there.
            if file.path().exists() {
                files.push(format!("{}/{}", part.to_string_lossy(), file.file_name().to_string_lossy()));
            }
        }
    }
    needed(&index, &files, wanted).map(drop)
}

/// Links a file of a snapshot to its blob, relative as Python does it: the cache can be moved.
fn link(blob: &Path, pointer: &Path, depth: usize) -> std::io::Result<()> {
    let _broken_link = std::fs::remove_file(pointer);
    let name = blob.file_name().expect("a blob has a name");
    #[cfg(unix)]
    {
        let target: PathBuf = std::iter::repeat_n("..", depth + 1).collect::<PathBuf>().join("blobs").join(name);
        std::os::unix::fs::symlink(target, pointer)
    }
    #[cfg(not(unix))]
    {
        let _ = (name, depth);
        std::fs::copy(blob, pointer).map(drop)
    }
}
