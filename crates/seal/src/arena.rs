//! Memory for keys that live long: pages that are locked, guarded and left out of core dumps.
//!
//! One page holds 127 keys, so that a process needs one page of its lock limit however many keys it has. A
//! page has an inaccessible page on either side (memsec), and is never given back, so no place here is ever
//! part of another allocation. A refused lock is reported, never a failed start: the keys are then as safe as
//! the swap device.

use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use zeroize::Zeroize;

/// Keys per page: 127 × 32 bytes and memsec's canary of 16 fit in 4,096.
const PER_PAGE: usize = 127;

/// The arena of this process.
pub(crate) static ARENA: Arena = Arena::new(lock_page);

/// Pages of 32-byte places.
pub(crate) struct Arena {
    pages: Mutex<Vec<Page>>,
    lock: fn(NonNull<[u8]>) -> bool,
}

struct Page {
    start: NonNull<[u8]>,
    /// One bit a place, set while it is taken.
    taken: u128,
    locked: bool,
}

/// A place that its holder alone reads and writes, until it gives it back.
pub(crate) struct Place {
    pub(crate) bytes: NonNull<[u8; 32]>,
    pub(crate) locked: bool,
    page: usize,
    index: usize,
}

impl Arena {
    pub(crate) const fn new(lock: fn(NonNull<[u8]>) -> bool) -> Self {
        Self { pages: Mutex::new(Vec::new()), lock }
    }

    /// Takes a free place; its bytes are zero.
    ///
    /// # Panics
    /// If the process is out of memory.
    pub(crate) fn take(&self) -> Place {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let with_room = pages.iter().position(|page| page.free().is_some());
        let number = with_room.unwrap_or_else(|| {
            pages.push(Page::allocate(self.lock));
            pages.len() - 1
        });
        let page = pages.get_mut(number).expect("the page was found or has just been added");
        let index = page.free().expect("the page has room or is new");
        page.taken |= 1 << index;
        Place { bytes: page.place(index), locked: page.locked, page: number, index }
    }

    /// Wipes a place and makes it free.
    pub(crate) fn give_back(&self, place: &mut Place) {
        place.wipe();
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(page) = pages.get_mut(place.page) {
            page.taken &= !(1 << place.index);
        }
    }
}

impl Page {
    fn free(&self) -> Option<usize> {
        let index = self.taken.trailing_ones() as usize;
        (index < PER_PAGE).then_some(index)
    }
}

#[expect(unsafe_code, reason = "memory outside the allocator, from the system")]
mod raw {
    use super::*;

    // SAFETY: a page is reached only under the arena's mutex, and a place only by the one holder to whom
    // `take` gave it.
    unsafe impl Send for Page {}

    impl Page {
        pub(super) fn allocate(lock: fn(NonNull<[u8]>) -> bool) -> Self {
            // SAFETY: no requirement; the memory is writable, `PER_PAGE * 32` bytes long and never freed.
            let mut start = unsafe { memsec::malloc_sized(PER_PAGE * 32) }.expect("memory for one more page");
            // SAFETY: just allocated, as long as the slice says, and nobody else has it yet.
            unsafe { start.as_mut() }.zeroize();
            Self { start, taken: 0, locked: lock(start) }
        }

        pub(super) fn place(&self, index: usize) -> NonNull<[u8; 32]> {
            assert!(index < PER_PAGE, "a place lies within its page");
            // SAFETY: the offset is within the allocation, by the assertion.
            unsafe { self.start.cast::<[u8; 32]>().add(index) }
        }
    }

    impl Place {
        /// The bytes.
        pub(crate) fn bytes(&self) -> &[u8; 32] {
            // SAFETY: points into a page that is never freed; `take` zeroed it, and gives it to no one else
            // until `give_back`, which needs this place mutably.
            unsafe { self.bytes.as_ref() }
        }

        /// The bytes, to fill in place.
        pub(crate) fn bytes_mut(&mut self) -> &mut [u8; 32] {
            // SAFETY: as in `bytes`, and the borrow of this place is exclusive.
            unsafe { self.bytes.as_mut() }
        }

        pub(super) fn wipe(&mut self) {
            self.bytes_mut().zeroize();
        }
    }

    // SAFETY: the holder's exclusive or shared borrow of the place governs access to the bytes, whichever
    // thread it is on.
    unsafe impl Send for Place {}
    // SAFETY: as above; a shared borrow only reads.
    unsafe impl Sync for Place {}

    /// memsec has locked the page already but does not say with what success; asking again does.
    pub(super) fn lock_page(page: NonNull<[u8]>) -> bool {
        // SAFETY: the range is one allocation of ours; locking changes no byte of it.
        unsafe { memsec::mlock(page.cast().as_ptr(), page.len()) }
    }
}

use raw::lock_page;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_zero_when_taken_and_wiped_when_given_back() {
        let arena = Arena::new(lock_page);
        let mut place = arena.take();
        assert_eq!(place.bytes(), &[0; 32]);
        place.bytes_mut().fill(7);
        arena.give_back(&mut place);
        assert_eq!(place.bytes(), &[0; 32]);
        assert_eq!(arena.take().bytes, place.bytes, "the first free place is taken again");
    }

    #[test]
    fn no_two_holders_share_a_place_over_several_pages() {
        let arena = Arena::new(lock_page);
        let places: Vec<Place> = (0..PER_PAGE * 2 + 1).map(|_| arena.take()).collect();
        let mut addresses: Vec<usize> = places.iter().map(|p| p.bytes.addr().get()).collect();
        addresses.sort_unstable();
        assert!(addresses.windows(2).all(|pair| pair[1] - pair[0] >= 32));
        assert_eq!(arena.pages.lock().unwrap().len(), 3);
    }

    #[test]
    fn a_refused_lock_is_told_and_the_place_works() {
        let arena = Arena::new(|_| false);
        let mut place = arena.take();
        assert!(!place.locked);
        place.bytes_mut().fill(7);
        assert_eq!(place.bytes(), &[7; 32]);
    }

    #[test]
    fn a_page_of_keys_is_locked_and_left_out_of_core_dumps() {
        let arena = Arena::new(lock_page);
        let place = arena.take();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let address = place.bytes.addr().get();
        let flags = vm_flags(&smaps, address).expect("the page is mapped");
        assert!(flags.contains(&"dd"), "do not dump: {flags:?}");
        assert_eq!(flags.contains(&"lo"), place.locked, "{flags:?}");
    }

    /// The flags of the mapping around an address.
    fn vm_flags(smaps: &str, address: usize) -> Option<Vec<&str>> {
        let mut inside = false;
        for line in smaps.lines() {
            if let Some((range, _)) = line.split_once(' ')
                && let Some((from, to)) = range.split_once('-')
                && let (Ok(from), Ok(to)) = (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16))
            {
                inside = (from..to).contains(&address);
            } else if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| inside) {
                return Some(flags.split_whitespace().collect());
            }
        }
        None
    }
}
