//! Files that a power cut leaves whole: old or new, never half. Nothing here knows what the bytes mean.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::Path,
};

use zeroize::Zeroizing;

/// Replaces `name` in `directory`: temporary file, fsync, rename, fsync of the directory.
///
/// The file belongs to the directory's owner. The caller holds the directory's lock: the temporary name is fixed.
pub(super) fn replace(directory: &Path, name: &str, bytes: &[u8], mode: u32) -> io::Result<()> {
    let temporary = directory.join(format!(".{name}.tmp"));
    // A leftover of a crash may have another owner or mode.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
    give_to_owner(&file, directory)?;
    // The umask may have taken bits away.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, directory.join(name))?;
    sync_directory(directory)
}

/// Makes renames and removals in `directory` durable.
pub(super) fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Gives `file` to the owner of `directory`, where they differ.
pub(super) fn give_to_owner(file: &File, directory: &Path) -> io::Result<()> {
    let (wanted, found) = (fs::metadata(directory)?, file.metadata()?);
    if (wanted.uid(), wanted.gid()) == (found.uid(), found.gid()) {
        return Ok(());
    }
    match fchown(file, Some(wanted.uid()), Some(wanted.gid())) {
        // Who owns the directory but is not in its group cannot give the group, and need not.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && wanted.uid() == found.uid() => {
            Ok(())
        }
        other => other,
    }
}

/// Reads a text of at most `max` bytes; `None` when there is no such file.
pub(super) fn read(path: &Path, max: u64) -> io::Result<Option<Zeroizing<String>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    // Room for the whole, so that a key is not left behind by a growing buffer.
    let length = file.metadata()?.len();
    if length > max {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("{length} bytes, at most {max} expected"),
        ));
    }
    let mut text = Zeroizing::new(String::with_capacity(usize::try_from(length).unwrap_or(0) + 1));
    file.take(max).read_to_string(&mut text)?;
    Ok(Some(text))
}
