//! Profiles as files: `profiles/<digest>` under the directory of a disk tier.
//!
//! `<digest>.partial` is one that is being written, and is swept at the start;
//! `<digest>.damaged` one that was found to be damaged, for the operator to look at. All
//! functions block.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use kvasir_codec::Profile;
use kvasir_types::{MAX_PROFILE_BYTES, ProfileDigest};

use super::ProfileInfo;
use crate::disk::{DiskTier, sync_directory};

#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    /// Has the lock of the directory, which lasts as long as files are written.
    _disk: DiskTier,
}

impl Directory {
    /// Opens a directory, makes it where missing, and reads all that is in it. What is
    /// damaged is set aside.
    pub(super) fn open(path: PathBuf, disk: DiskTier) -> io::Result<(Self, Vec<ProfileInfo>)> {
        if !path.is_dir() {
            fs::create_dir_all(&path)?;
            path.parent().map_or(Ok(()), sync_directory)?;
        }
        let directory = Self { path, _disk: disk };
        let mut found = Vec::new();
        for entry in fs::read_dir(&directory.path)? {
            let file = entry?.path();
            let extension = file.extension().and_then(|it| it.to_str());
            let stem = file.file_stem().and_then(|it| it.to_str());
            let digest = stem.and_then(|stem| stem.parse().ok());
            match (digest, extension) {
                (Some(_), Some(PARTIAL)) => fs::remove_file(&file)?,
                (Some(_), Some(DAMAGED)) => (),
                (Some(digest), None) => found.extend(directory.recover(&file, digest)),
                _ => tracing::warn!(file = %file.display(), "not a profile; left alone"),
            }
        }
        Ok((directory, found))
    }

    /// What a file is, if it is what its name says.
    fn recover(&self, file: &Path, digest: ProfileDigest) -> Option<ProfileInfo> {
        let data = match read_bounded(file) {
            Ok(data) => data,
            Err(error) => {
                // It may be readable next time.
                tracing::warn!(%digest, %error, "a profile cannot be read; not served");
                return None;
            }
        };
        if ProfileDigest::of(&data) != digest {
            self.set_aside(&digest);
            return None;
        }
        match Profile::verify(&data) {
            Ok(shape) => Some(ProfileInfo {
                digest,
                bytes: data.len() as u64,
                shape,
            }),
            Err(error) => {
                // The very bytes that were put, by a daemon that could read them.
                tracing::warn!(%digest, %error, "a profile of another version; not served");
                None
            }
        }
    }

    /// Writes a profile that is not there: afterwards all of it is, after a power cut too.
    pub(super) fn write(&self, digest: &ProfileDigest, data: &[u8]) -> io::Result<()> {
        let partial = self.file(digest).with_extension(PARTIAL);
        let written = (|| {
            let mut file = File::create(&partial)?;
            file.write_all(data)?;
            // Before the name: a name must not outlive a power cut that its bytes did not.
            file.sync_all()?;
            fs::rename(&partial, self.file(digest))?;
            sync_directory(&self.path)
        })();
        written.inspect_err(|_| {
            // Best effort: the error that matters is the first one. A file that stays is
            // swept at the next start, or whole.
            let _ = fs::remove_file(&partial);
            let _ = fs::remove_file(self.file(digest));
        })
    }

    /// Reads a profile of the length of `place`. False where it is no longer there or
    /// damaged; in the latter case it is set aside.
    pub(super) fn read(&self, digest: &ProfileDigest, place: &mut [u8]) -> io::Result<bool> {
        let mut file = match File::open(self.file(digest)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::warn!(%digest, "the file of a profile has gone");
                return Ok(false);
            }
            file => file?,
        };
        let whole = match file.read_exact(place) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => false,
            read => {
                read?;
                file.read(&mut [0])? == 0
            }
        };
        if whole && ProfileDigest::of(place) == *digest {
            return Ok(true);
        }
        self.set_aside(digest);
        Ok(false)
    }

    pub(super) fn remove(&self, digest: &ProfileDigest) -> io::Result<()> {
        match fs::remove_file(self.file(digest)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => sync_directory(&self.path),
        }
    }

    fn set_aside(&self, digest: &ProfileDigest) {
        let file = self.file(digest);
        let aside = file.with_extension(DAMAGED);
        let moved = fs::rename(&file, &aside).and_then(|()| sync_directory(&self.path));
        tracing::warn!(
            %digest,
            aside = %aside.display(),
            error = moved.err().map(tracing::field::display),
            "a profile is damaged and no longer served; put it again",
        );
    }

    fn file(&self, digest: &ProfileDigest) -> PathBuf {
        self.path.join(digest.to_string())
    }
}

/// A file, and no more of it than a profile may have.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut data = Vec::new();
    let file = File::open(path)?;
    // One byte more, so that a longer file is not taken for its beginning.
    file.take(MAX_PROFILE_BYTES + 1).read_to_end(&mut data)?;
    Ok(data)
}

const PARTIAL: &str = "partial";
const DAMAGED: &str = "damaged";
