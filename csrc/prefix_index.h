// Finds the block of the KV cache that holds the next tokens of a prefix.
//
// The registered blocks form a forest. A block's parent is the block before it in its prefix, or none if it comes first
// in its namespace; the edge down to it is its tokens. An edge is looked up by a hash chained over the namespace and
// all tokens so far, and taken only if namespace, parent *and the stored tokens* are equal: a collision of hashes costs
// time, never a wrong hit. Since a block leaves the index together with all blocks under it, equal parents mean equal
// prefixes, and every registered block can be reached.
//
// Not thread-safe. Nothing is allocated after construction.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pcm {

inline constexpr int32_t kNoBlock = -1;

class PrefixIndex {
 public:
  // hash_mask: the bits of a hash that are kept.
  PrefixIndex(int32_t num_blocks, int32_t block_size, uint64_t hash_mask);

  // The tokens of a block, [block_size]. They may change as long as the block is not registered.
  int32_t* tokens(int32_t block) { return &tokens_[static_cast<size_t>(block) * block_size_]; }
  const int32_t* tokens(int32_t block) const { return &tokens_[static_cast<size_t>(block) * block_size_]; }

  bool contains(int32_t block) const { return nodes_[block].serial != 0; }
  // Which registration this is, never the same number twice; 0 if not registered.
  uint64_t serial(int32_t block) const { return nodes_[block].serial; }

  // The registered block with these tokens after `parent` (kNoBlock: first in the namespace), or kNoBlock.
  int32_t find(uint64_t namespace_id, int32_t parent, const int32_t* block_tokens) const {
    return find(namespace_id, parent, block_tokens, hash_after(namespace_id, parent, block_tokens));
  }

  // The registered block with the tokens of `block` after `parent`; if there is none, `block` becomes it.
  int32_t find_or_add(uint64_t namespace_id, int32_t parent, int32_t block);

  // Block `to`, which is not registered, becomes what `from` was: its tokens and, if it had one, its registration.
  void move(int32_t from, int32_t to);

  // Takes out a registered block and all blocks under it, leaves first, and calls removed(block) for each.
  template <typename Removed>
  void remove_subtree(int32_t root, Removed removed) {
    int32_t block = root;
    while (true) {
      while (nodes_[block].first_child != kNoBlock) block = nodes_[block].first_child;
      const int32_t parent = nodes_[block].parent;
      remove_leaf(block);
      removed(block);
      if (block == root) return;
      block = parent;
    }
  }

  // Recounts everything. Throws std::logic_error naming what is wrong.
  void check() const;

 private:
  struct Node {
    uint64_t serial = 0;
    uint64_t hash = 0;  // of the namespace and all tokens up to the end of this block
    uint64_t namespace_id = 0;
    int32_t next_in_bucket = kNoBlock;
    int32_t parent = kNoBlock;
    int32_t first_child = kNoBlock;
    int32_t prev_sibling = kNoBlock, next_sibling = kNoBlock;  // of a block with a parent
  };

  uint64_t hash_after(uint64_t namespace_id, int32_t parent, const int32_t* block_tokens) const;
  int32_t find(uint64_t namespace_id, int32_t parent, const int32_t* block_tokens, uint64_t hash) const;
  int32_t& link_to(int32_t block);  // what names a registered block in its bucket
  void remove_leaf(int32_t block);
  size_t bucket(uint64_t hash) const { return hash & (buckets_.size() - 1); }

  int32_t block_size_;
  uint64_t hash_mask_;
  std::vector<Node> nodes_;
  std::vector<int32_t> tokens_;
  std::vector<int32_t> buckets_;  // first block of each bucket; a power of two of them
  uint64_t last_serial_ = 0;
};

}  // namespace pcm
