//! The disk shim (`tests/shim/disk.c`): built, and told what to do.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use anyhow::{Context, anyhow, ensure};

use crate::child::{self, Spec};

/// The size of the page that is shared with the shim.
const PAGE: usize = 4096;

/// What happens to the disk, or to the program at an operation of the disk. Operations count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: a run to count the operations.
    None,
    /// The program is killed instead of this operation.
    KillAt(u64),
    /// The program is killed right after this operation.
    KillAfter(u64),
    /// The power goes while this operation is under way.
    PowerCut {
        /// The operation.
        at: u64,
        /// 0 undoes all that was not synced, another number a subset of it.
        seed: u64,
    },
    /// Operations from `from` to `to` fail; then the power goes.
    ErrorThenPowerCut {
        /// What they fail with.
        error: DiskError,
        /// The first one.
        from: u64,
        /// The last one.
        to: u64,
        /// When the power goes.
        at: u64,
        /// As for [`Fault::PowerCut`].
        seed: u64,
    },
}

/// How a disk fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskError {
    /// It is full.
    Full,
    /// It fails.
    Io,
    /// It has become read-only.
    ReadOnly,
}

impl DiskError {
    fn option(self) -> &'static str {
        match self {
            Self::Full => "enospc-at",
            Self::Io => "eio-at",
            Self::ReadOnly => "erofs-at",
        }
    }

    fn errno(self) -> u64 {
        let error = match self {
            Self::Full => rustix::io::Errno::NOSPC,
            Self::Io => rustix::io::Errno::IO,
            Self::ReadOnly => rustix::io::Errno::ROFS,
        };
        u64::from(error.raw_os_error().unsigned_abs())
    }
}

impl Fault {
    fn options(self) -> String {
        match self {
            Self::None => String::new(),
            Self::KillAt(at) => format!(";kill-at={at}"),
            Self::KillAfter(at) => format!(";kill-after={at}"),
            Self::PowerCut { at, seed } => format!(";power-cut-at={at};seed={seed}"),
            Self::ErrorThenPowerCut { error, from, to, at, seed } => {
                format!(";{}={from}..{to};power-cut-at={at};seed={seed}", error.option())
            }
        }
    }

    /// How much is undone when the power goes, if it does.
    pub fn power_cut(self) -> Option<u64> {
        match self {
            Self::PowerCut { seed, .. } | Self::ErrorThenPowerCut { seed, .. } => Some(seed),
            Self::None | Self::KillAt(_) | Self::KillAfter(_) => None,
        }
    }

    /// Whether the disk refuses some operations, so that the program may give up by itself.
    pub fn has_errors(self) -> bool {
        matches!(self, Self::ErrorThenPowerCut { .. })
    }
}

/// Which operations fail.
#[derive(Clone, Copy, Debug)]
pub enum Where<'a> {
    /// All.
    Everywhere,
    /// fsync and fdatasync.
    Syncs,
    /// Those on files with this in their path.
    Files(&'a str),
    /// fsync and fdatasync of files with this in their path.
    SyncsOf(&'a str),
}

/// Builds the shim into cargo's target directory.
///
/// # Errors
/// When there is no C compiler or it refuses, with what it said.
pub fn library() -> anyhow::Result<PathBuf> {
    static BUILT: LazyLock<Result<PathBuf, String>> =
        LazyLock::new(|| build().map_err(|error| format!("{error:?}")));
    BUILT.clone().map_err(|error| anyhow!(error))
}

fn build() -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe()?;
    let directory = test.parent().context("a test program lives in a directory")?;
    // Two test programs may build at the same time: each renames a file of its own into place.
    let own = directory.join(format!("disk-shim-{}.so", std::process::id()));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("shim/disk.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"]).arg(&own).arg(source);
    child::run(compiler.args(["-ldl", "-lpthread"]))?;
    let library = directory.join("disk-shim.so");
    fs::rename(own, &library)?;
    Ok(library)
}

/// One run of a program over the shim.
pub struct Shim {
    page: File,
    options: String,
    library: PathBuf,
}

/// What the shim did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fired {
    /// The operation at which the program died.
    pub at: u64,
    /// What it was.
    pub kind: &'static str,
    /// On which path.
    pub path: String,
    /// The write-ahead log held what no fsync had made durable: a transaction was being committed.
    pub in_transaction: bool,
    /// How many changes the power cut undid.
    pub undone: u64,
}

impl Shim {
    /// Prepares a run in which the files below `watched` count. `control` must not exist.
    ///
    /// # Errors
    /// When the shim cannot be built or the file not be made.
    pub fn new(watched: &Path, control: &Path, fault: Fault) -> anyhow::Result<Self> {
        let page = File::options().read(true).write(true).create_new(true).open(control)?;
        page.set_len(PAGE as u64)?;
        let watched = watched.to_str().context("a path in UTF-8")?;
        let control = control.to_str().context("a path in UTF-8")?;
        ensure!(!format!("{watched}{control}").contains(';'), "the shim's options are split at ';'");
        let options = format!("watch={watched};control={control}{}", fault.options());
        Ok(Self { page, options, library: library()? })
    }

    /// Makes syncs of paths with `text` in them do nothing and say that all is well.
    #[must_use]
    pub fn lying_about(mut self, text: &str) -> Self {
        self.options += &format!(";lie-about-fsync={text}");
        self
    }

    /// Lets the power go when the program has ended by itself; `seed` as for [`Fault::PowerCut`].
    #[must_use]
    pub fn cutting_at_exit(mut self, seed: u64) -> Self {
        self.options += &format!(";cut-at-exit=1;seed={seed}");
        self
    }

    /// Preloads the shim into a program.
    pub fn preload(&self, spec: Spec) -> Spec {
        spec.env("LD_PRELOAD", &self.library).env("DISK_SHIM", &self.options)
    }

    /// The operations so far.
    ///
    /// # Errors
    /// When the page cannot be read.
    pub fn operations(&self) -> anyhow::Result<u64> {
        self.read(0)
    }

    /// The operations that failed so far.
    ///
    /// # Errors
    /// When the page cannot be read.
    pub fn errors(&self) -> anyhow::Result<u64> {
        self.read(64)
    }

    /// From now on, also while the program runs, operations fail: all, or `where_` says which.
    ///
    /// # Errors
    /// When the page cannot be written.
    pub fn fail_now(&self, error: DiskError, where_: Where<'_>) -> anyhow::Result<()> {
        let (only_syncs, only) = match where_ {
            Where::Everywhere => (false, ""),
            Where::Syncs => (true, ""),
            Where::Files(text) => (false, text),
            Where::SyncsOf(text) => (true, text),
        };
        let mut text = [0; 128];
        text.get_mut(..only.len()).context("a short text")?.copy_from_slice(only.as_bytes());
        self.page.write_all_at(&text, 640)?;
        self.write(56, u64::from(only_syncs))?;
        self.write(40, 1)?;
        self.write(48, 0)?;
        self.write(32, error.errno())
    }

    /// The disk works again.
    ///
    /// # Errors
    /// When the page cannot be written.
    pub fn heal(&self) -> anyhow::Result<()> {
        self.write(32, 0)
    }

    /// What happened to the program, if anything did.
    ///
    /// # Errors
    /// When the page cannot be read.
    pub fn fired(&self) -> anyhow::Result<Option<Fired>> {
        let at = self.read(72)?;
        if at == 0 {
            return Ok(None);
        }
        let mut path = [0; 408];
        self.page.read_exact_at(&mut path, 104)?;
        let path = path.split(|byte| *byte == 0).next().unwrap_or_default();
        let kinds = ["create", "write", "truncate", "rename", "unlink", "sync", "sync directory"];
        let kind = usize::try_from(self.read(80)?)?.checked_sub(1).and_then(|kind| kinds.get(kind));
        Ok(Some(Fired {
            at,
            kind: kind.copied().context("a kind of operation")?,
            path: String::from_utf8_lossy(path).into_owned(),
            in_transaction: self.read(88)? & 1 != 0,
            undone: self.read(96)?,
        }))
    }

    fn read(&self, offset: u64) -> anyhow::Result<u64> {
        let mut bytes = [0; 8];
        self.page.read_exact_at(&mut bytes, offset)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn write(&self, offset: u64, value: u64) -> anyhow::Result<()> {
        Ok(self.page.write_all_at(&value.to_ne_bytes(), offset)?)
    }
}
