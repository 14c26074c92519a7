//! A root key in a file: 32 bytes, raw, in hex or in base64; also a systemd credential.
//!
//! The file is as secret as every KEK of the fleet, so it is refused when anyone but its owner can read it.
//! This module never changes a root key file that exists.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use data_encoding::{BASE64, BASE64_NOPAD, Encoding, HEXLOWER, HEXLOWER_PERMISSIVE};
use fleet_kms_keyring::{SlotId, StoreId, stack};
use rand_core::CryptoRng;
use rustix::fs::OFlags;
use zeroize::Zeroizing;

use crate::slot::{RootSlot, SlotError};
use crate::{LockedKey, SlotKind, SlotRecord, StoreKey};

/// A root key from a file, ready to seal and open.
pub struct FileSlot {
    root: LockedKey,
}

impl FileSlot {
    /// Makes a new root key file, mode 0400, durable on return.
    ///
    /// # Errors
    /// [`RootFileError::Exists`] rather than replace a file; [`RootFileError::Write`], and then no file is left.
    pub fn create(path: &Path, rng: &mut dyn CryptoRng) -> Result<Self, RootFileError> {
        let slot = Self { root: LockedKey::generate(rng) };
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o400).open(path).map_err(|source| {
                let path = path.to_owned();
                match source.kind() {
                    io::ErrorKind::AlreadyExists => RootFileError::Exists { path },
                    _ => RootFileError::Write { path, source },
                }
            })?;
        slot.write(&mut file).and_then(|()| sync_directory_of(path)).map_err(|source| {
            // Half a key would only be in the way of the next try, and no slot uses it yet.
            let _ = fs::remove_file(path);
            RootFileError::Write { path: path.to_owned(), source }
        })?;
        Ok(slot)
    }

    /// Reads a root key file.
    ///
    /// # Errors
    /// [`RootFileError`] names the file, what is wrong and the remedy.
    pub fn open(path: &Path) -> Result<Self, RootFileError> {
        let slot = Self::read(path, OWNER_ONLY);
        stack::burn();
        slot
    }

    /// Reads a root key from systemd's credentials directory, by its name.
    ///
    /// systemd shows a credential to the unit's user through an ACL, which the group bits of the mode then
    /// reflect (0440, owned by root); the directory lets nobody else in.
    ///
    /// # Errors
    /// As [`Self::open`], and for a name that is a path.
    pub fn open_credential(directory: &Path, name: &str) -> Result<Self, RootFileError> {
        if name.is_empty() || name == "." || name == ".." || name.contains('/') {
            return Err(RootFileError::CredentialName { name: name.to_owned() });
        }
        let slot = Self::read(&directory.join(name), OWNER_ONLY | 0o040);
        stack::burn();
        slot
    }

    /// Takes a root key from the content of its file, which the caller has read and judged.
    ///
    /// For a process that is kept from the file by its own confinement and gets the content from one that is not.
    #[must_use]
    pub fn from_content(content: &[u8]) -> Option<Self> {
        let slot = parse(content).map(|root| Self { root: LockedKey::from_zeroizing(root) });
        stack::burn();
        slot
    }

    #[inline(never)]
    fn read(path: &Path, allowed_mode: u32) -> Result<Self, RootFileError> {
        let file = open_no_follow(path)?;
        let metadata = file.metadata().map_err(|source| read_error(path, source))?;
        let uid = rustix::process::geteuid().as_raw();
        check(path, &metadata, allowed_mode, uid)?;
        let mut content = Zeroizing::new([0; MAX_CONTENT + 1]);
        let len = read_up_to(file, content.as_mut_slice()).map_err(|source| read_error(path, source))?;
        let content = content.get(..len).unwrap_or_default();
        let len = metadata.len();
        let root = parse(content).ok_or_else(|| RootFileError::Content { path: path.to_owned(), len })?;
        Ok(Self { root: LockedKey::from_zeroizing(root) })
    }

    /// As text, so that it can be kept on paper too.
    fn write(&self, file: &mut File) -> io::Result<()> {
        let mut text = Zeroizing::new([0; HEX_LEN + 1]);
        let (line_break, hex) = text.split_last_mut().expect("the text is not empty");
        HEXLOWER.encode_mut(self.root.expose_secret(), hex);
        *line_break = b'\n';
        file.write_all(text.as_slice())?;
        file.sync_all()
    }
}

impl RootSlot for FileSlot {
    fn kind(&self) -> SlotKind {
        SlotKind::File
    }

    fn seal(&self, key: &StoreKey, slot: SlotId, rng: &mut dyn CryptoRng) -> Result<SlotRecord, SlotError> {
        Ok(SlotRecord::seal(self.kind(), slot, Vec::new(), &self.root, key, rng))
    }

    fn open(&self, record: &SlotRecord, store: StoreId) -> Result<StoreKey, SlotError> {
        if record.kind() != self.kind() {
            return Err(SlotError::WrongKind { kind: self.kind(), found: record.kind() });
        }
        if !record.parameters().is_empty() {
            return Err(SlotError::Parameters);
        }
        record.open(store, &self.root)
    }
}

/// Why a root key file is not used, with the remedy.
#[derive(Debug, thiserror::Error)]
pub enum RootFileError {
    /// It is not there, or cannot be read.
    #[error("cannot read root key file {}; check its name, its owner and the directories above", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A link, which whoever may write its directory can turn elsewhere.
    #[error("root key file {} is a symbolic link; name the file that it points to", path.display())]
    Link {
        /// The file.
        path: PathBuf,
    },
    /// A directory, a pipe or a device.
    #[error("root key file {} is not a regular file; name a file that holds the key", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// Others than its owner can read or write it.
    #[error("root key file {0} has mode {mode:04o}; run chmod 0400 {0}", path.display())]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It belongs to someone else, who can read it.
    #[error("root key file {0} is owned by uid {owner}; run chown {uid} {0}", path.display())]
    Owner {
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Who this process runs as.
        uid: u32,
    },
    /// It holds no key.
    #[error(
        "root key file {} has {len} bytes; it must hold 32 raw bytes, 64 hex digits or 44 base64 characters",
        path.display()
    )]
    Content {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
    /// A credential's name that leaves the credentials directory.
    #[error("credential name {name:?} is a path; name a credential of the unit, without a slash")]
    CredentialName {
        /// The name.
        name: String,
    },
    /// A new file where one is.
    #[error("root key file {} exists; move it away or name another, it may be the only way to open a store", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The new file cannot be made durable.
    #[error("cannot write root key file {}; check its directory and the free space", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// Modes 0400 and 0600.
const OWNER_ONLY: u32 = 0o600;

const HEX_LEN: usize = 64;

/// Hex digits and a line break of either kind.
const MAX_CONTENT: usize = HEX_LEN + 2;

/// Opens without following a link, and without waiting for the other end of a pipe.
fn open_no_follow(path: &Path) -> Result<File, RootFileError> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC).bits();
    let flags = i32::try_from(flags).expect("open flags are small");
    OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(|source| {
        match source.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
            Some(rustix::io::Errno::LOOP) => RootFileError::Link { path: path.to_owned() },
            _ => read_error(path, source),
        }
    })
}

/// Judges the opened file, so that nothing can change between the look and the use.
fn check(path: &Path, metadata: &fs::Metadata, allowed_mode: u32, uid: u32) -> Result<(), RootFileError> {
    let path = path.to_owned();
    if !metadata.is_file() {
        return Err(RootFileError::NotAFile { path });
    }
    if metadata.uid() != uid && metadata.uid() != 0 {
        return Err(RootFileError::Owner { path, owner: metadata.uid(), uid });
    }
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & !allowed_mode != 0 {
        return Err(RootFileError::Mode { path, mode });
    }
    Ok(())
}

fn read_up_to(mut file: File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while let Some(rest) = buffer.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match file.read(rest) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(len)
}

/// Raw bytes count as they are; around text, one line break at the end is no part of it.
fn parse(content: &[u8]) -> Option<Zeroizing<[u8; 32]>> {
    let mut root = Zeroizing::new([0; 32]);
    if content.len() == root.len() {
        root.copy_from_slice(content);
        return Some(root);
    }
    let text = content.strip_suffix(b"\n").unwrap_or(content);
    let text = text.strip_suffix(b"\r").unwrap_or(text);
    let encoding: Encoding = match text.len() {
        HEX_LEN => HEXLOWER_PERMISSIVE,
        44 => BASE64,
        43 => BASE64_NOPAD,
        _ => return None,
    };
    let decoded_len = encoding.decode_len(text.len()).ok()?;
    let mut decoded = Zeroizing::new(vec![0; decoded_len]);
    let len = encoding.decode_mut(text, &mut decoded).ok()?;
    root.copy_from_slice(decoded.get(..len).filter(|decoded| decoded.len() == 32)?);
    Some(root)
}

fn sync_directory_of(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

fn read_error(path: &Path, source: io::Error) -> RootFileError {
    RootFileError::Read { path: path.to_owned(), source }
}
