//! The contexts file: which agent to talk to, and as whom.
//!
//! TOML, mode 0600; `kms-agent init` writes the first one. Paths in it are
//! relative to its folder. It names the key file and never holds a key.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Bits that no file with a say in whom we trust may have: writable by others.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// The contexts file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// Name of the current context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    current: Option<String>,
    #[serde(default)]
    contexts: Vec<Context>,
}

/// An agent to talk to, and as whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// Its name.
    pub name: String,
    /// The agent's admin port, `host:7445`.
    pub server: String,
    /// PEM file with the admin's certificate and its issuing CA.
    pub certificate: PathBuf,
    /// PEM file with the key.
    pub key: PathBuf,
    /// PEM file with the fleet's roots.
    pub roots: PathBuf,
}

/// The contexts that were read, with their paths made absolute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contexts {
    path: PathBuf,
    file: File,
}

/// Why there is no context to use.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// Neither the file nor its default place is known.
    #[error("no contexts file: neither --config, KMSCTL_CONFIG, XDG_CONFIG_HOME nor HOME is set")]
    NoPlace,
    /// The file is not there.
    #[error("there is no contexts file {}", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The file cannot be read or written.
    #[error("cannot {verb} {}", path.display())]
    Io {
        /// `read` or `write`.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others could change whom we trust.
    #[error("{} may be changed by others (mode {mode:04o})", path.display())]
    Writable {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The file does not parse.
    #[error("{} does not parse: {source}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// No context of this name.
    #[error("there is no context `{name}` in {}", path.display())]
    Unknown {
        /// The name.
        name: String,
        /// The file.
        path: PathBuf,
    },
    /// None was named and none is current.
    #[error("no context is current in {}", path.display())]
    NoneCurrent {
        /// The file.
        path: PathBuf,
    },
}

impl ContextError {
    /// What to do about it.
    pub fn remedy(&self) -> String {
        match self {
            Self::NoPlace => "name the file with --config".into(),
            Self::Missing { .. } => {
                "`kms-agent init` writes the first one; name it with --config or KMSCTL_CONFIG".into()
            }
            Self::Io { path, .. } => format!("check that {} is yours", path.display()),
            Self::Writable { path, .. } => format!("run chmod 0600 {}", path.display()),
            Self::Syntax { .. } => "mend the file; docs/kmsctl.md shows its form".into(),
            Self::Unknown { .. } => "run `kmsctl context list`".into(),
            Self::NoneCurrent { .. } => "run `kmsctl context use NAME`, or give --context".into(),
        }
    }
}

impl Contexts {
    /// Reads the file `named`, or the one at the default place.
    ///
    /// # Errors
    /// When it is missing, writable by others or does not parse.
    pub fn read(named: Option<&Path>) -> Result<Self, ContextError> {
        let path = match named {
            Some(path) => path.to_owned(),
            None => {
                default_path(|name| std::env::var_os(name).map(PathBuf::from)).ok_or(ContextError::NoPlace)?
            }
        };
        let failed = |source: io::Error, path: &Path| match source.kind() {
            io::ErrorKind::NotFound => ContextError::Missing { path: path.to_owned() },
            _ => ContextError::Io { verb: "read", path: path.to_owned(), source },
        };
        let mode = fs::metadata(&path).map_err(|source| failed(source, &path))?.mode() & 0o7777;
        if mode & WRITABLE_BY_OTHERS != 0 {
            return Err(ContextError::Writable { path, mode });
        }
        let text = fs::read_to_string(&path).map_err(|source| failed(source, &path))?;
        let file = toml::from_str(&text)
            .map_err(|source| ContextError::Syntax { path: path.clone(), source: Box::new(source) })?;
        Ok(Self { path, file })
    }

    /// Where the contexts were read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All contexts, as the file has them.
    pub fn all(&self) -> &[Context] {
        &self.file.contexts
    }

    /// Name of the current context: the named one, or the only one there is.
    pub fn current(&self) -> Option<&str> {
        match (&self.file.current, self.file.contexts.as_slice()) {
            (Some(name), _) => Some(name),
            (None, [only]) => Some(&only.name),
            (None, _) => None,
        }
    }

    /// The context `name`, or the current one, with absolute paths.
    ///
    /// # Errors
    /// When there is none.
    pub fn resolve(&self, name: Option<&str>) -> Result<Context, ContextError> {
        let path = || self.path.clone();
        let name = name.or(self.current()).ok_or_else(|| ContextError::NoneCurrent { path: path() })?;
        let found = self.file.contexts.iter().find(|context| context.name == name);
        let context = found.ok_or_else(|| ContextError::Unknown { name: name.to_owned(), path: path() })?;
        let folder = self.path.parent().unwrap_or(Path::new("."));
        Ok(Context {
            name: context.name.clone(),
            server: context.server.clone(),
            certificate: folder.join(&context.certificate),
            key: folder.join(&context.key),
            roots: folder.join(&context.roots),
        })
    }

    /// Makes a context the current one, on disk too.
    ///
    /// # Errors
    /// When there is none of that name, or the file cannot be written.
    pub fn use_context(&mut self, name: &str) -> Result<(), ContextError> {
        self.resolve(Some(name))?;
        self.file.current = Some(name.to_owned());
        self.write().map_err(|source| ContextError::Io { verb: "write", path: self.path.clone(), source })
    }

    /// Replaces the file as a whole, so that no crash leaves half of it.
    fn write(&self) -> io::Result<()> {
        let text = toml::to_string(&self.file).map_err(io::Error::other)?;
        write_whole(&self.path, &text)
    }
}

/// Replaces a file that a context names.
///
/// # Errors
/// When it cannot be written; then the old one stays.
pub(crate) fn replace_file(path: &Path, text: &str) -> Result<(), ContextError> {
    write_whole(path, text).map_err(|source| ContextError::Io {
        verb: "write",
        path: path.to_owned(),
        source,
    })
}

fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    let mut temporary = path.to_owned().into_os_string();
    temporary.push(format!(".{}.new", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&temporary, path));
    written.inspect_err(|_| _ = fs::remove_file(&temporary))
}

/// `$XDG_CONFIG_HOME` or `~/.config`, then `fleet-kms/kmsctl.toml`.
fn default_path(env: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let not_empty = |name| env(name).filter(|value: &PathBuf| !value.as_os_str().is_empty());
    let folder = not_empty("XDG_CONFIG_HOME").or_else(|| Some(not_empty("HOME")?.join(".config")))?;
    Some(folder.join("fleet-kms/kmsctl.toml"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const TWO: &str = r#"
current = "north"
[[contexts]]
name = "north"
server = "10.0.0.1:7445"
certificate = "north/chain.pem"
key = "north/key.pem"
roots = "/etc/fleet-kms/roots.pem"
[[contexts]]
name = "south"
server = "10.0.0.2:7445"
certificate = "south/chain.pem"
key = "south/key.pem"
roots = "south/roots.pem"
"#;

    fn file(text: &str, mode: u32) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kmsctl.toml");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        (folder, path)
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let (folder, path) = file(TWO, 0o600);
        let context = Contexts::read(Some(&path)).unwrap().resolve(None).unwrap();
        assert_eq!(context.key, folder.path().join("north/key.pem"));
        assert_eq!(context.roots, Path::new("/etc/fleet-kms/roots.pem"));
    }

    #[test]
    fn using_another_context_keeps_the_rest_and_the_mode() {
        let (_folder, path) = file(TWO, 0o600);
        Contexts::read(Some(&path)).unwrap().use_context("south").unwrap();
        let again = Contexts::read(Some(&path)).unwrap();
        assert_eq!(again.current(), Some("south"));
        assert_eq!(again.all().len(), 2);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn the_only_context_needs_no_naming() {
        let (_folder, path) = file(&TWO[TWO.rfind("[[").unwrap()..], 0o600);
        assert_eq!(Contexts::read(Some(&path)).unwrap().resolve(None).unwrap().name, "south");
    }

    #[test]
    fn an_unknown_context_a_typo_and_a_missing_file_are_told_apart() {
        let (folder, path) = file(TWO, 0o600);
        let contexts = Contexts::read(Some(&path)).unwrap();
        assert!(matches!(contexts.resolve(Some("west")), Err(ContextError::Unknown { .. })));
        let (_other, typo) = file("curent = \"x\"", 0o600);
        let error = Contexts::read(Some(&typo)).unwrap_err();
        assert!(error.to_string().contains("curent"), "{error}");
        let missing = Contexts::read(Some(&folder.path().join("none.toml")));
        assert!(matches!(missing, Err(ContextError::Missing { .. })));
    }

    #[test]
    fn a_file_that_others_may_change_is_refused() {
        let (_folder, path) = file(TWO, 0o620);
        let error = Contexts::read(Some(&path)).unwrap_err();
        assert!(error.to_string().contains("0620") && error.remedy().contains("chmod 0600"), "{error}");
    }

    #[test]
    fn the_default_place_follows_xdg_then_home() {
        let xdg = default_path(|name| (name == "XDG_CONFIG_HOME").then(|| "/x".into()));
        assert_eq!(xdg.unwrap(), Path::new("/x/fleet-kms/kmsctl.toml"));
        let home = default_path(|name| (name == "HOME").then(|| "/h".into()));
        assert_eq!(home.unwrap(), Path::new("/h/.config/fleet-kms/kmsctl.toml"));
        assert_eq!(default_path(|_| None), None);
    }
}
